// PyTorch's memory for tensors on the CPU, with small blocks kept for the next tensor of their size.
//
// PyTorch asks the C library for memory at a multiple of 64 bytes. glibc finds a larger block, cuts it and frees the
// rest, which takes nearly as long as a small network's products. Here a block has one of 11 sizes, 64 bytes to 64 KiB;
// each thread keeps what it frees, up to 1 MiB of each size. Every block is one of the C library's, so that it does not
// matter whether a tensor's memory came from here or is freed here. PyTorch's memory profiler does not see this.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#ifdef __APPLE__
#include <malloc/malloc.h>
#else
#include <malloc.h>
#endif

#include <bit>
#include <cstdint>
#include <new>

namespace {

constexpr size_t ALIGNMENT = 64, MOST_KEPT = size_t{1} << 20;  // bytes
constexpr size_t SIZES = 11;

struct Block {
  Block* next;
};

// A tensor may be freed when a thread's destructors have run: these have none.
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

size_t room(void* data) {
#ifdef __APPLE__
  return malloc_size(data);
#else
  return malloc_usable_size(data);
#endif
}

void release(void* data) {
  if (data == nullptr) return;
  const size_t bytes = room(data), size = std::bit_width(bytes / ALIGNMENT) - size_t{1};  // the largest that it holds
  const bool ours = size < SIZES && bytes - (ALIGNMENT << size) < ALIGNMENT &&
                    reinterpret_cast<std::uintptr_t>(data) % ALIGNMENT == 0;  // or might be
  if (over || !ours || (count[size] + 1) * (ALIGNMENT << size) > MOST_KEPT) {
    c10::free_cpu(data);
    return;
  }
  if (kept[size] == nullptr) {
    thread_local AtTheEnd at_the_end;
    (void)at_the_end;
  }
  kept[size] = new (data) Block{kept[size]};
  ++count[size];
}

struct CachingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = bytes == 0 ? SIZES : std::bit_width((bytes - 1) / ALIGNMENT);
    void* data;
    if (size >= SIZES) {
      data = c10::alloc_cpu(bytes);
    } else if (kept[size] == nullptr) {
      data = c10::alloc_cpu(ALIGNMENT << size);
    } else {
      data = kept[size];
      kept[size] = kept[size]->next;
      --count[size];
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" void install() {
  static CachingAllocator allocator;
  c10::SetCPUAllocator(&allocator, 1);
}

// Bytes that this thread keeps, without what the C library adds to them.
extern "C" std::uint64_t kept_bytes() {
  std::uint64_t bytes = 0;
  for (size_t size = 0; size < SIZES; ++size) bytes += count[size] * (ALIGNMENT << size);
  return bytes;
}
