// One tile of the fused projection: its sizes, where its columns and rows come from, and which
// thread holds what of it.
#pragma once

#include "cuda/column.cuh"

namespace rope_fused::cuda {

// The columns of a tile are whole heads, and of each head pair after pair: the two members of pair
// j are columns 2 j and 2 j + 1, whatever lies between them in the head. The TMA unit puts the rows
// of the weight in that order. Dimensions that are not rotated come behind, two by two.
struct HeadPairs {
  int rotated;  // pairs
  int offset;   // where the rotated slice begins
  int rest;     // where the other dimensions begin
  bool interleaved;

  ROPE_FUSED_DEVICE int first(int j) const {
    return j < rotated ? offset + (interleaved ? 2 * j : j) : rest + 2 * (j - rotated);
  }
  ROPE_FUSED_DEVICE int second(int j) const {
    return first(j) + (j < rotated && !interleaved ? rotated : 1);
  }
};

// The two dimensions of a pair, and where they are in the boxes of row 0, in bytes.
struct alignas(8) PairPlace {
  uint16_t dim[2], box[2];
};

template <int kDim>
struct Tile {
  static constexpr int kHeads = kDim == 64 ? 2 : 1;
  static constexpr int kColumns = kHeads * kDim;
  static constexpr int kBlocks = 288 / kColumns;  // of 64 rows: at most 144 sums of a thread
  static constexpr int kRows = 64 * kBlocks;
  static constexpr int kDepth = 64;  // of d_model at a time: 128 bytes, as wide as a swizzle
  static constexpr int kBytes = 2 * kDepth * (kRows + kColumns);  // of a stage
  static constexpr int kSums = kColumns / 2;  // of a thread, for each block of rows

  // The result leaves by boxes of 16 rows, of as many columns as a swizzle and the head allow.
  static constexpr int kBoxColumns = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;
  static constexpr int kBoxBytes = 2 * 16 * kBoxColumns;
  static constexpr int kBoxes = kColumns / kBoxColumns;
  static constexpr int kStaged = kBoxes * kBoxBytes;  // bytes of a warp

  static constexpr int kShared = 227 << 10;
  static constexpr int kReserved = 2048;  // barriers, places of pairs
  static constexpr int kStages = (kShared - kReserved - 8 * kStaged) / kBytes;
  static_assert(kStages >= 3 && kDim % 16 == 0);

  // Where dimension d of the first head is in the boxes of a warp's row 0, in bytes. Other rows lie
  // below, their chunks of 16 bytes moved by the swizzle: address ^ swizzle_of(row) + row_at(row).
  ROPE_FUSED_DEVICE static int box_of(int d) {
    return d / kBoxColumns * kBoxBytes + 2 * (d % kBoxColumns);
  }
  ROPE_FUSED_DEVICE static int row_at(int row) { return 2 * kBoxColumns * row; }
  ROPE_FUSED_DEVICE static int swizzle_of(int row) {
    return row_at(row) >> 3 & (2 * kBoxColumns - 16);
  }
};

// The fragment of a matrix product of 64 rows: what thread `lane` of warp `warp` of a warpgroup has
// in its number i (PTX ISA, wgmma.mma_async, "Register Fragments", D).
ROPE_FUSED_DEVICE int fragment_row(int warp, int lane, int i) {
  return 16 * warp + lane / 4 + 8 * (i / 2 % 2);
}
ROPE_FUSED_DEVICE int fragment_column(int lane, int i) {
  return 8 * (i / 4) + 2 * (lane % 4) + i % 2;
}

// Where wgmma finds an operand: rows of 64 16-bit numbers in 128-byte swizzle, groups of eight rows
// behind each other. 32 bytes further on come the next 16 columns.
ROPE_FUSED_DEVICE uint64_t operand_at(uint32_t address) {
  constexpr uint64_t kGroups = uint64_t{1024 / 16} << 32, kUnused = uint64_t{1} << 16;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kGroups | kUnused | (address & 0x3ffff) / 16;
}

// The order of tiles: bands of kBand tiles of rows, and in each all tiles of columns, so that those
// that are computed at the same time share rows of x and of the weights in the L2 cache.
constexpr int kBand = 8;
struct Place {
  int rows, columns;  // numbers of tiles
};
ROPE_FUSED_DEVICE Place place_of(int index, int tall, int wide) {
  const int band = index / (kBand * wide), within = index % (kBand * wide);
  const int height = tall - band * kBand < kBand ? tall - band * kBand : kBand;
  return {band * kBand + within % height, within / height};
}

}  // namespace rope_fused::cuda
