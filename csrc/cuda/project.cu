// The projections to q, k and v in one launch, their norm and rotation in its epilogue (sm_90a).
//
// Persistent and warp-specialised. A cluster of two blocks works on two tiles side by side, of the
// same rows of x, half of which each block loads for both. In a block one warp keeps a ring of
// stages full, and two warpgroups take turns: while one adds up the products of its tile, the other
// norms, rotates and stores the tile before.
#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda/epilogue.cuh"
#include "cuda/hopper.cuh"
#include "cuda/projection.h"
#include "cuda/tensor_map.h"

namespace rope_fused::cuda {
namespace {

using namespace hopper;

constexpr int kCluster = 2;
constexpr uint16_t kEveryBlock = (1 << kCluster) - 1;
constexpr int kProjectThreads = 3 * 128;  // a warpgroup that loads, two that compute
constexpr int kMaxStages = 8;

// What a block's threads share beside the stages and the boxes.
struct Shared {
  Barrier full[kMaxStages], empty[kMaxStages];
  Barrier turn[2];  // of each warpgroup, to multiply
  PairPlace places[128];
};

// A place in the ring of stages.
template <int kStages>
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;

  ROPE_FUSED_DEVICE void advance(int steps) {
    stage += steps;
    phase ^= stage / kStages & 1;
    stage %= kStages;
  }
  ROPE_FUSED_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The tile of this block in number `index` of the tiles of clusters.
struct Target {
  int row, operand, head;  // operand 3: none, the cluster has one tile too many

  template <class Shape>
  ROPE_FUSED_DEVICE static Target of(const ProjectCall& call, int index, int rank) {
    const Place place = place_of(index, call.tall, call.wide);
    const int tile = place.columns * kCluster + rank;
    int operand = 0;
    while (operand < 3 && tile >= call.operands[operand].tiles) ++operand;
    const int before = operand == 0 ? 0 : call.operands[operand - 1].tiles;
    return {place.rows * Shape::kRows, operand, (tile - before) * Shape::kHeads};
  }
};

template <class T, int kDim, bool kPlain>
struct Project {
  using Shape = Tile<kDim>;
  using Ring = Cursor<Shape::kStages>;
  static constexpr int kRowBytes = 2 * Shape::kDepth;
  static constexpr int kHalf = Shape::kRows / kCluster;

  const ProjectCall& call;
  Shared& shared;
  char* stages;
  const int rank, first, stride, count;  // of the tiles of this block's cluster

  ROPE_FUSED_DEVICE char* x_of(int stage) const { return stages + stage * Shape::kBytes; }
  ROPE_FUSED_DEVICE char* w_of(int stage) const { return x_of(stage) + Shape::kRows * kRowBytes; }

  // One thread: keeps the ring full.
  ROPE_FUSED_DEVICE void load_tiles() const {
    Ring ring;
    for (int index = first; index < count; index += stride) {
      const Target target = Target::of<Shape>(call, index, rank);
      // Weights of no operand are zeros, those of heads that do not exist.
      const ProjectedHeads& operand = call.operands[target.operand % 3];
      const int head = target.operand < 3 ? target.head : operand.heads;
      for (int step = 0; step < call.steps; ++step, ring.next()) {
        shared.empty[ring.stage].wait(ring.phase ^ 1);
        Barrier& full = shared.full[ring.stage];
        full.arrive_expecting(Shape::kBytes);
        const int column = step * Shape::kDepth;
        load_for_all(x_of(ring.stage) + rank * kHalf * kRowBytes, call.x, full, column,
                     target.row + rank * kHalf, kEveryBlock);
#pragma unroll
        for (int h = 0; h < Shape::kHeads; ++h) {
          char* to = w_of(ring.stage) + h * kDim * kRowBytes;
          load_of_head(to, operand.weight[0], full, column, head + h);
          if (2 * call.pairs.rotated < kDim) {
            load_of_head(to + 2 * call.pairs.rotated * kRowBytes, operand.weight[1], full, column,
                         head + h);
          }
        }
      }
    }
  }

  // One warpgroup, `own` of two: the products of its tiles, and what becomes of them.
  ROPE_FUSED_DEVICE void compute_tiles(int own, char* staged) const {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Ring ring;
    ring.advance(own * call.steps % (2 * Shape::kStages));
    uint32_t phase = own ^ 1;  // the first turn is the first warpgroup's
    for (int index = first + own * stride; index < count; index += 2 * stride) {
      const Target target = Target::of<Shape>(call, index, rank);
      float sums[Shape::kBlocks][Shape::kSums];
      shared.turn[own].wait(phase);
      phase ^= 1;
      multiply(sums, ring, lane, own);
      ring.advance(call.steps % (2 * Shape::kStages));
      if (target.operand == 3) continue;
      const Epilogue<T, kDim, kPlain> epilogue{
          call, call.operands[target.operand], shared.places, staged, warp, lane};
#pragma unroll
      for (int block = 0; block < Shape::kBlocks; ++block) {
        epilogue.finish(sums[block], target.row + 64 * block, target.head);
      }
    }
    if (lane == 0) wait_for_stores();
  }

 private:
  ROPE_FUSED_DEVICE void release(int stage, int lane) const {
    if (lane < kCluster) shared.empty[stage].arrive_at(lane);
  }

  // The products of a tile, then the other warpgroup's turn. A stage is released when the products
  // behind it have been issued and its own are done.
  ROPE_FUSED_DEVICE void multiply(float (&sums)[Shape::kBlocks][Shape::kSums], Ring& ring, int lane,
                                  int own) const {
    int last = 0;
    for (int step = 0; step < call.steps; ++step, ring.next()) {
      shared.full[ring.stage].wait(ring.phase);
      begin_products();
      const uint64_t x = operand_at(address_of(x_of(ring.stage)));
      const uint64_t w = operand_at(address_of(w_of(ring.stage)));
#pragma unroll
      for (int k = 0; k < Shape::kDepth / 16; ++k) {
#pragma unroll
        for (int block = 0; block < Shape::kBlocks; ++block) {
          Product<T, Shape::kColumns>::issue(sums[block], x + block * 64 * kRowBytes / 16 + 2 * k,
                                             w + 2 * k, step + k);
        }
      }
      commit_products();
      wait_for_products<1>();
      if (step > 0) release(last, lane);
      last = ring.stage;
    }
    if (lane == 0) shared.turn[own ^ 1].arrive();
    wait_for_products<0>();
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) settle(sums[block]);
    release(last, lane);
  }
};

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kProjectThreads, 1)
    project_kernel(const __grid_constant__ ProjectCall call) {
  using Shape = Tile<kDim>;
  static_assert(sizeof(Shared) <= Shape::kReserved && Shape::kStages <= kMaxStages);
  char* stages = shared_memory();
  char* staged = stages + Shape::kStages * Shape::kBytes;
  Shared& shared = *reinterpret_cast<Shared*>(staged + 8 * Shape::kStaged);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(4 * kCluster);  // the warps that have multiplied it
    }
    shared.turn[0].init(4);
    shared.turn[1].init(4);
    fence_new_barriers();
  }
  if (threadIdx.x < kDim / 2) {
    const int a = call.pairs.first(threadIdx.x), b = call.pairs.second(threadIdx.x);
    shared.places[threadIdx.x] = {
        {static_cast<uint16_t>(a), static_cast<uint16_t>(b)},
        {static_cast<uint16_t>(Shape::box_of(a)), static_cast<uint16_t>(Shape::box_of(b))}};
  }
  sync_cluster();
  const Project<T, kDim, kPlain> project{call,
                                         shared,
                                         stages,
                                         static_cast<int>(rank_in_cluster()),
                                         static_cast<int>(blockIdx.x / kCluster),
                                         static_cast<int>(gridDim.x / kCluster),
                                         call.tall * call.wide};
  if (warp < 4) {
    give_registers_down_to<24>();
    if (threadIdx.x == 0) project.load_tiles();
  } else {
    take_registers_up_to<240>();
    project.compute_tiles(warp / 4 - 1, staged + (warp - 4) * Shape::kStaged);
  }
  // The other block may still be filling this one's stages, or releasing its own.
  sync_cluster();
}

template <class T, int kDim>
void project_typed(const Projection& p, const Rotation& r, const Stream& stream) {
  using Shape = Tile<kDim>;
  const TensorMaps maps(T::kBrain);
  const auto pairs = static_cast<uint64_t>(r.pairs), others = kDim / 2 - pairs;
  ProjectCall call{};
  call.rotation = r;
  call.pairs = {static_cast<int>(pairs), static_cast<int>(r.offset),
                r.offset == 0 ? static_cast<int>(2 * pairs) : 0, r.interleaved};
  call.tokens = static_cast<int>(p.tokens);
  call.steps = static_cast<int>((p.d_model + Shape::kDepth - 1) / Shape::kDepth);
  call.tall = static_cast<int>((p.tokens + Shape::kRows - 1) / Shape::kRows);
  call.x = maps.rows(p.x, p.tokens, p.d_model, p.x_step, Shape::kRows / kCluster, Shape::kDepth);

  int tiles = 0;
  for (int n = 0; n < 3; ++n) {
    const ProjectedRows& from = p.rows[n];
    ProjectedHeads& to = call.operands[n];
    tiles += static_cast<int>((from.heads + Shape::kHeads - 1) / Shape::kHeads);
    to.tiles = tiles;
    to.heads = static_cast<int>(from.heads);
    if (from.heads == 0) continue;
    // Pair j is rows offset + j and offset + j + pairs of a head, or interleaved 2 j and 2 j + 1.
    const T* weight = static_cast<const T*>(from.weight);
    const int64_t step = from.weight_step;
    const auto of_pairs = [&](int64_t first, uint64_t count, int64_t along, int64_t across) {
      return maps.pairs(weight + first * step, p.d_model, count, from.heads,
                        {across * step, along * step, kDim * step}, Shape::kDepth);
    };
    to.weight[0] = of_pairs(r.offset, pairs, r.interleaved ? 2 : 1, r.interleaved ? 1 : pairs);
    if (others > 0) to.weight[1] = of_pairs(call.pairs.rest, others, 2, 1);
    const auto of_heads = [&](const void* y, int64_t y_step) {
      return maps.rows(y, p.tokens, from.heads * kDim, y_step, 16, Shape::kBoxColumns);
    };
    to.result = of_heads(from.y, from.y_step);
    to.keeps = from.kept != nullptr;
    if (to.keeps) to.kept = of_heads(from.kept, from.kept_step);
    to.bias = from.bias;
    to.norm = from.norm;
    to.turned = n < 2;
    to.token_scaled = n == 0 && r.token_scale != nullptr;
  }
  call.wide = (tiles + kCluster - 1) / kCluster;

  const int clusters = std::min(call.tall * call.wide, processors(stream) / kCluster);
  const auto run = [&](auto plain) {
    launch<project_kernel<T, kDim, plain.value>>(dim3(clusters * kCluster), kProjectThreads, call,
                                                 stream, kCluster, Shape::kShared);
  };
  if constexpr (kDim <= 192) {  // beyond, the angles of a row take more registers than there are
    if (others == 0 && r.table_index == nullptr && r.axis_map == nullptr) {
      return run(std::true_type{});
    }
  }
  run(std::false_type{});
}

template <class T, size_t... kIndex>
void project_of(const Projection& p, const Rotation& r, const Stream& stream,
                std::index_sequence<kIndex...>) {
  const auto run = [&](auto index) {
    constexpr int kDim = kProjectedHeadDims[index.value];
    if (r.head_dim != kDim) return false;
    project_typed<T, kDim>(p, r, stream);
    return true;
  };
  if (!(run(std::integral_constant<size_t, kIndex>{}) || ...)) {
    throw std::invalid_argument("the fused projection has no tile for heads of " +
                                std::to_string(r.head_dim) + " dimensions");
  }
}

}  // namespace

void project(const Projection& p, const Rotation& r, const Stream& stream) {
  constexpr auto kEvery = std::make_index_sequence<std::size(kProjectedHeadDims)>{};
  if (r.dtype == DType::kBFloat16) return project_of<BFloat16>(p, r, stream, kEvery);
  if (r.dtype == DType::kFloat16) return project_of<Float16>(p, r, stream, kEvery);
  throw std::invalid_argument("the fused projection takes bfloat16 and float16");
}

}  // namespace rope_fused::cuda
