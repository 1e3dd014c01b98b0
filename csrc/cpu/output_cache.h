// Memory for large outputs, kept when an output dies and lent to the next one of about its size.
//
// glibc maps every block from 32 MiB on anew and unmaps it when it is freed, so that an output
// costs a page fault per page, more than the rotation itself, in every call. Blocks that wait
// here may lose their pages whenever the system wants memory (MADV_FREE), and there are never more
// of them than an eighth of it. Not thread safe: the caller holds the GIL.
#pragma once

#include <cstddef>
#include <deque>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#define ROPE_FUSED_OUTPUT_CACHE 1

namespace rope_fused {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

class OutputCache {
 public:
  // A block of at least `bytes`, with whatever was in it.
  Block take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    auto best = waiting_.end();  // the smallest, and of those the one that was used last
    for (auto block = waiting_.begin(); block != waiting_.end(); ++block) {
      const bool fits = bytes <= block->bytes && block->bytes - bytes <= bytes / 8;
      if (fits && (best == waiting_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best == waiting_.end()) return map(bytes);
    const Block found = *best;
    waiting_.erase(best);
    waiting_bytes_ -= found.bytes;
    return found;
  }

  void give(Block block) {
    madvise(block.data, block.bytes, MADV_FREE);
    waiting_.push_back(block);
    waiting_bytes_ += block.bytes;
    while (waiting_bytes_ > limit_) {  // the oldest go first
      waiting_bytes_ -= waiting_.front().bytes;
      munmap(waiting_.front().data, waiting_.front().bytes);
      waiting_.pop_front();
    }
  }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;

  static Block map(size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    madvise(data, bytes, MADV_HUGEPAGE);
    return {data, bytes};
  }

  std::deque<Block> waiting_;
  size_t waiting_bytes_ = 0;
  const size_t limit_ =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 8;
};

}  // namespace rope_fused
#endif
