// What happens to 64 rows of the projection between their sums and their store: bias, RMSNorm,
// rotation, factors, one rounding. All of a head's row is in the registers of four threads, both
// members of each of its pairs in one.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/projection.h"
#include "cuda/tile.cuh"

namespace rope_fused::cuda {

// kPlain: all of a head is rotated, by angles of one table and one axis of positions.
template <class T, int kDim, bool kPlain>
struct Epilogue {
  using Shape = Tile<kDim>;
  using Sums = float[Shape::kSums];
  static constexpr int kGroups = kDim / 8;  // of a head: eight columns, of which a thread has two

  const ProjectCall& call;
  const ProjectedHeads& operand;
  const PairPlace* places;  // of the pairs of a head
  char* staged;             // memory of this warp alone
  const int warp, lane;

  // The sums of 64 rows from `row` on, of the heads from `head` on, to where they go.
  ROPE_FUSED_DEVICE void finish(Sums& sums, int row, int head) const {
    if (operand.bias != nullptr) add_bias(sums, head);
#pragma unroll 1
    for (bool done = !operand.keeps;; done = true) {
      if (done && operand.turned) {
#pragma unroll
        for (int h = 0; h < Shape::kHeads; ++h) turn(sums, h * kGroups, row);
      }
      store(sums, done ? operand.result : operand.kept, row, head);
      if (done) return;
    }
  }

 private:
  // A row of the fragment, as a token.
  struct Row {
    TokenAt token;
    int64_t position, entries;  // where its row of the tables begins
    float factor;
  };
  ROPE_FUSED_DEVICE Row row_at(int row) const {
    const Rotation& r = call.rotation;
    Row at{token_at(row, call.tokens, r.seqlen), 0, 0, 1};
    if (!at.token.live) return at;
    at.position = position_of(r, 0, at.token);
    if (r.conjugate) at.position = -at.position;
    if (!kPlain) at.entries = table_row(r, at.token) * r.pairs;
    if (operand.token_scaled) at.factor = token_scale_of<float>(r, at.token);
    return at;
  }

  // The pair of a head that this thread has in group g of its columns.
  ROPE_FUSED_DEVICE int pair(int g) const { return 4 * g + lane % 4; }

  ROPE_FUSED_DEVICE void add_bias(Sums& sums, int head) const {
    const T* bias = static_cast<const T*>(operand.bias);
#pragma unroll
    for (int n = 0; n < Shape::kHeads * kGroups; ++n) {
      const int j = pair(n % kGroups), own = head + n / kGroups;
      if (own >= operand.heads) break;
      const PairPlace place = places[j];
      const float a = load(bias[own * kDim + place.dim[0]]);
      const float b = load(bias[own * kDim + place.dim[1]]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        sums[4 * n + i] += a;
        sums[4 * n + i + 1] += b;
      }
    }
  }

  // Norm and rotation of one head, whose columns are the groups from `start` on.
  ROPE_FUSED_DEVICE void turn(Sums& sums, int start, int first_row) const {
    if (operand.norm != nullptr) normalise(sums, start);
    Row rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) rows[i] = row_at(first_row + fragment_row(warp, lane, 2 * i));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float* pairs = sums + 4 * (start + g);
      if (kPlain || 4 * g < call.pairs.rotated) {
        turn_pairs(pairs, rows, pair(g));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] *= rows[i / 2].factor;
      }
    }
  }

  // Pair j in each of two rows.
  ROPE_FUSED_DEVICE void turn_pairs(float* pairs, const Row (&rows)[2], int j) const {
    const Rotation& r = call.rotation;
    uint64_t turns = 0;
    float scale = 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!kPlain || i == 0) {
        turns = r.turns[rows[i].entries + j];
        scale = static_cast<float>(r.scale[rows[i].entries + j]);
      }
      int64_t position = rows[i].position;
      if (!kPlain && r.axis_map != nullptr && rows[i].token.live) {
        position = position_of(r, r.axis_map[j], rows[i].token);
        if (r.conjugate) position = -position;
      }
      const CosSin<float> angle = cos_sin(phase32(position, turns));
      const float factor = scale * rows[i].factor;
      const Pair<float> turned =
          ::rotate(pairs[2 * i], pairs[2 * i + 1], angle.cos * factor, angle.sin * factor);
      pairs[2 * i] = turned.a;
      pairs[2 * i + 1] = turned.b;
    }
  }

  ROPE_FUSED_DEVICE void normalise(Sums& sums, int start) const {
    const float* weight = static_cast<const float*>(operand.norm);
    float rstd[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float squares = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float a = sums[4 * (start + g) + 2 * i], b = sums[4 * (start + g) + 2 * i + 1];
        squares += a * a + b * b;
      }
      squares += __shfl_xor_sync(0xffffffffu, squares, 1);
      squares += __shfl_xor_sync(0xffffffffu, squares, 2);
      rstd[i] = 1.0f / sqrtf(squares * (1.0f / kDim) + static_cast<float>(call.rotation.norm_eps));
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int j = pair(g);
      const PairPlace place = places[j];
      const float a = weight[place.dim[0]], b = weight[place.dim[1]];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* value = sums + 4 * (start + g) + 2 * i;
        value[0] = value[0] * rstd[i] * a;
        value[1] = value[1] * rstd[i] * b;
      }
    }
  }

  // Rounded, in the order of the head, through shared memory. What lies outside of the tensor is
  // left out by the TMA unit.
  ROPE_FUSED_DEVICE void store(const Sums& sums, const CUtensorMap& to, int row, int head) const {
    if (lane == 0) hopper::wait_for_stores();
    __syncwarp();
    const int own = fragment_row(0, lane, 0);
#pragma unroll
    for (int n = 0; n < Shape::kHeads * kGroups; ++n) {
      const PairPlace place = places[pair(n % kGroups)];
      const int head_box = Shape::box_of(n / kGroups * kDim);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t both = packed<T>(sums[4 * n + 2 * i], sums[4 * n + 2 * i + 1]);
#pragma unroll
        for (int member = 0; member < 2; ++member) {
          // The second row is eight further down, where the swizzle is the same.
          char* to = staged + Shape::row_at(own) + (place.box[member] ^ Shape::swizzle_of(own));
          *reinterpret_cast<uint16_t*>(to + head_box + Shape::row_at(8 * i)) =
              static_cast<uint16_t>(both >> 16 * member);
        }
      }
    }
    hopper::fence_before_stores();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int box = 0; box < Shape::kBoxes; ++box) {
        hopper::store_box(to, staged + box * Shape::kBoxBytes,
                          head * kDim + box * Shape::kBoxColumns, row + 16 * warp);
      }
      hopper::commit_stores();
    }
  }
};

}  // namespace rope_fused::cuda
