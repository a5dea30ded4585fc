// PyTorch's memory for tensors on the CPU, with small blocks kept for the next tensor of their size.
//
// PyTorch asks the C library for memory at a multiple of 64 bytes. glibc finds a larger block, cuts it and frees the
// rest, which costs as much as the arithmetic of a small network. Here a block has one of 11 sizes, 64 bytes to 64 KiB;
// each thread keeps what it frees, up to 1 MiB of each size.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <bit>
#include <cstdint>

namespace {

constexpr size_t ALIGNMENT = 64, MOST_KEPT = size_t{1} << 20;  // bytes
constexpr size_t SIZES = 11;

struct alignas(ALIGNMENT) Block {  // what stands before a tensor's memory
  Block* next;
  size_t size;  // its index; SIZES: larger than those, not kept
};

// Without destructors, for a tensor may be freed after them.
thread_local Block* kept[SIZES];
thread_local size_t count[SIZES];
thread_local bool over;

struct AtTheEnd {
  ~AtTheEnd() {
    over = true;
    for (Block*& first : kept) {
      while (first != nullptr) {
        Block* next = first->next;
        c10::free_cpu(first);
        first = next;
      }
    }
  }
};

void release(void* data) {
  if (data == nullptr) return;
  Block* block = static_cast<Block*>(data) - 1;
  const size_t size = block->size;
  if (size == SIZES || over || (count[size] + 1) * (ALIGNMENT << size) > MOST_KEPT) {
    c10::free_cpu(block);
    return;
  }
  block->next = kept[size];
  kept[size] = block;
  ++count[size];
}

struct CachingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    const size_t size = std::min<size_t>(SIZES, std::bit_width((bytes - 1) / ALIGNMENT));
    Block* block = size < SIZES ? kept[size] : nullptr;
    if (block != nullptr) {
      kept[size] = block->next;
      --count[size];
    } else {
      thread_local AtTheEnd at_the_end;
      (void)at_the_end;
      block = static_cast<Block*>(c10::alloc_cpu(sizeof(Block) + (size < SIZES ? ALIGNMENT << size : bytes)));
      block->size = size;
    }
    void* data = block + 1;
    return {data, data, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" void install() {
  static CachingAllocator allocator;
  c10::SetCPUAllocator(&allocator, 1);
}

// Bytes that this thread keeps.
extern "C" std::uint64_t kept_bytes() {
  std::uint64_t bytes = 0;
  for (size_t size = 0; size < SIZES; ++size) bytes += count[size] * (ALIGNMENT << size);
  return bytes;
}
