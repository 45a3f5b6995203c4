#include "stream_order.hpp"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "contexts.hpp"

namespace cuda_emulation {
namespace {

struct Stream {
  std::uint64_t number;
  int device;
  bool waits_for_default;  // and is waited for by it
  bool destroyed = false;
  Clock done_before = {};  // whatever it is given next
};

struct Memory {
  std::size_t bytes;
  Clock used;
};

// Streams that nobody created are told apart by their device.
using Key = std::pair<int, cudaStream_t>;
constexpr int any_device = -1;

struct Order {
  std::mutex mutex;
  std::map<Key, Stream> streams;
  std::uint64_t numbers = 0;
  std::map<const char*, Memory> memories;
  Clock known_to_host;
};

Order& order() {
  static Order& order = *new Order;
  return order;
}

void join(Clock& into, const Clock& other) {
  for (const auto& [stream, work] : other) into[stream] = std::max(into[stream], work);
}

bool includes(const Clock& clock, std::uint64_t stream, std::uint64_t work) {
  const auto found = clock.find(stream);
  return found != clock.end() && found->second >= work;
}

cudaStream_t handle(std::uintptr_t number) { return reinterpret_cast<cudaStream_t>(number); }
const cudaStream_t default_stream = nullptr, same_by_number = handle(1);
const cudaStream_t default_stream_of_thread = handle(2);

Stream& find_stream(cudaStream_t stream) {
  if (stream == same_by_number) stream = default_stream;
  auto& streams = order().streams;
  const int device = thread_device();
  const auto created = streams.find({any_device, stream});
  if (created != streams.end()) {
    if (created->second.destroyed) fail("a stream that was destroyed is used", CallSite::here());
    if (created->second.device != device) {
      fail("a stream of another device is used", CallSite::here());
    }
    return created->second;
  }
  const bool waits = stream == default_stream || stream == default_stream_of_thread;
  const auto inserted = streams.insert({{device, stream}, Stream{order().numbers, device, waits}});
  if (inserted.second) ++order().numbers;
  return inserted.first->second;
}

// Puts something on the stream.
Stream& advance(cudaStream_t handle_of_it) {
  Stream& stream = find_stream(handle_of_it);
  if (handle_of_it == default_stream || handle_of_it == same_by_number) {
    for (const auto& [key, other] : order().streams) {
      if (other.device == stream.device && other.waits_for_default) {
        join(stream.done_before, other.done_before);
      }
    }
  } else if (stream.waits_for_default) {
    join(stream.done_before, find_stream(default_stream).done_before);
  }
  ++stream.done_before[stream.number];
  return stream;
}

Memory* memory_at(const void* p) {
  auto& memories = order().memories;
  const auto* byte = static_cast<const char*>(p);
  auto next = memories.upper_bound(byte);
  if (next == memories.begin()) return nullptr;
  --next;
  return byte < next->first + next->second.bytes ? &next->second : nullptr;
}

void mark_used(const void* p, const Stream& by) {
  Memory* const memory = memory_at(p);
  if (memory != nullptr) memory->used[by.number] = by.done_before.at(by.number);
}

bool remove_behind(const Clock& done, const void* p) {
  const auto found = order().memories.find(static_cast<const char*>(p));
  if (found == order().memories.end()) return false;
  for (const auto& [stream, work] : found->second.used) {
    if (includes(done, stream, work) || includes(order().known_to_host, stream, work)) continue;
    fail("memory is freed on a stream that does not wait for another one's use of it",
         CallSite::here());
  }
  order().memories.erase(found);
  return true;
}

}  // namespace

void add_stream(cudaStream_t stream, bool waits_for_default) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  const Stream created{order().numbers++, thread_device(), waits_for_default};
  order().streams.insert_or_assign({any_device, stream}, created);
}

void remove_stream(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  const auto found = order().streams.find({any_device, stream});
  if (found != order().streams.end()) found->second.destroyed = true;
}

void add_memory(void* p, std::size_t bytes, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  order().memories[static_cast<const char*>(p)] = Memory{bytes, {}};
  mark_used(p, advance(stream));
}

bool remove_memory(void* p, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  return remove_behind(advance(stream).done_before, p);
}

bool remove_idle_memory(void* p) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  return remove_behind({}, p);
}

void add_work(cudaStream_t stream, const void* pointers, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  const Stream& on = advance(stream);
  const auto* from = static_cast<const char*>(pointers);
  for (std::size_t i = 0; i + sizeof(void*) <= bytes; i += sizeof(void*)) {
    const void* p = nullptr;
    std::memcpy(&p, from + i, sizeof(p));
    mark_used(p, on);
  }
}

Clock progress_of(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  return advance(stream).done_before;
}

void wait_for(cudaStream_t stream, const Clock& progress) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  join(advance(stream).done_before, progress);
}

void host_waits_for(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(order().mutex);
  join(order().known_to_host, advance(stream).done_before);
}

void host_waits_for_device() {
  const std::lock_guard<std::mutex> lock(order().mutex);
  for (const auto& [key, stream] : order().streams) {
    if (stream.device == thread_device()) join(order().known_to_host, stream.done_before);
  }
}

}  // namespace cuda_emulation
