// Runs a launch: cluster after cluster, the fibres of a cluster's threads in turns.
//
// Nothing waits for anything in particular: a thread that cannot go on leaves its place in its
// warp's mask of ready lanes, and whoever arrives last puts everyone back. When no thread is ready
// and some have not exited, somebody waits for what cannot come.
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "execution.hpp"
#include "fibre.hpp"
#include "settings.hpp"

#if CUDA_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_emulation {
namespace {

constexpr unsigned warp_size = 32;

struct Block;
struct Cluster;

enum class Wait : std::uint8_t { none, block_barrier, warp_operation, cluster_barrier };

struct Thread {
  Fibre* fibre;
  Block* block;
  unsigned number;
  uint3 index;

  Wait wait = Wait::none;
  bool exited = false;
  bool arrived_at_cluster = false;
  bool waited_for_previous_grid = false;
  bool allowed_next_grid = false;
  CallSite site = {"", 0};  // of the last barrier or warp operation
  std::uint64_t cluster_phase = 0;

  WarpOperation operation = WarpOperation::sync;
  unsigned mask = 0;
  unsigned source = 0;
  std::uint64_t value = 0;
  std::uint64_t result = 0;
};

struct Warp {
  unsigned lanes;  // that the block has
  unsigned ready;
  unsigned exited = 0;
  unsigned in_operation = 0;
};

struct Block {
  uint3 index;
  std::size_t number;  // in the grid
  unsigned rank;       // in the cluster
  Cluster* cluster;
  void* shared;
  bool started;
  unsigned arrived;
  CallSite barrier;
  unsigned live;
  std::vector<Thread> threads;
  std::vector<Warp> warps;

  bool ready() const {
    for (const Warp& warp : warps) {
      if (warp.ready != 0) return true;
    }
    return false;
  }
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned threads;
  unsigned arrived;
  std::uint64_t phase;
  unsigned live;
};

bool same(CallSite a, CallSite b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string text(CallSite site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

template <class Index>
std::string text(const Index& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

std::string text(const Thread& thread) {
  return "block " + text(thread.block->index) + " thread " + text(thread.index);
}

const char* name(Wait wait) {
  switch (wait) {
    case Wait::none: return "to run";
    case Wait::block_barrier: return "at the block's barrier";
    case Wait::warp_operation: return "for the lanes of a warp operation";
    case Wait::cluster_barrier: return "at the cluster's barrier";
  }
  return "";
}

// What the threads of a block do, alike ones together.
std::string describe(const Block& block) {
  struct Group {
    const Thread* first;
    unsigned count;
  };
  std::vector<Group> groups;
  for (const Thread& thread : block.threads) {
    bool counted = false;
    for (Group& group : groups) {
      const Thread& first = *group.first;
      if (thread.exited != first.exited) continue;
      if (!thread.exited && (thread.wait != first.wait || !same(thread.site, first.site))) continue;
      ++group.count;
      counted = true;
      break;
    }
    if (!counted) groups.push_back(Group{&thread, 1});
  }
  std::string out;
  for (const Group& group : groups) {
    const Thread& first = *group.first;
    out += "\n  block " + text(block.index) + ": " + std::to_string(group.count) +
           (group.count == 1 ? " thread, " : " threads from ") + text(first.index) + ", ";
    if (first.exited) {
      out += "exited";
      continue;
    }
    out += std::string(group.count == 1 ? "waits " : "wait ") + name(first.wait) + ", " +
           text(first.site);
    if (first.wait == Wait::warp_operation) {
      char mask[32];
      std::snprintf(mask, sizeof mask, ", mask 0x%08x", first.mask);
      out += mask;
    }
  }
  return out;
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // Below `end`, which is not zero.
  std::uint64_t below(std::uint64_t end) { return next() % end; }

  template <class T>
  void shuffle(std::vector<T>& list) {
    for (std::size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
  }

 private:
  std::uint64_t next() {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::uint64_t state_;
};

class Scheduler {
 public:
  void set_seed(std::uint64_t seed) {
    in_order_ = seed == 0;
    random_ = Random(seed);
  }

  void run(const Launch& launch);

  LastLaunch& record() { return record_; }
  const LastLaunch& previous_record() const { return previous_record_; }

  void set_previous_grid(std::function<void()> work) { previous_grid_ = std::move(work); }
  void finish_previous_grid() {
    if (previous_grid_) std::exchange(previous_grid_, nullptr)();
  }

 private:
  void prepare(Block& block);
  void release_memory(Block& block);
  void run_cluster();
  Block* choose_block();
  void run_turn(Block& block);
  void run_warp(Block& block, Warp& warp);
  void collect(Block& block, Warp& warp);
  void run_collected();
  void run_thread(Thread& thread);
  void finish(Thread& thread);
  [[noreturn]] void report_deadlock() const;

  const Launch* launch_ = nullptr;
  LastLaunch record_;
  LastLaunch previous_record_;
  bool in_order_ = true;
  Random random_{0};
  std::function<void()> previous_grid_;
  Cluster cluster_;
  std::vector<Thread*> turn_;
};

// One launch at a time, from whichever OS thread.
std::mutex launch_mutex;
Scheduler scheduler;

// The CUDA thread that this OS thread runs.
thread_local Thread* current = nullptr;
thread_local const Launch* current_launch = nullptr;

[[noreturn]] void fail(const std::string& message) {
  std::string out = "cuda emulation: ";
  if (current != nullptr) {
    out += text(*current) + " of grid " + text(current_launch->grid) + ", blocks of " +
           text(current_launch->block) + ": ";
  }
  out += message + "\n";
  std::fputs(out.c_str(), stderr);
  std::fflush(stderr);
  std::abort();
}

Thread& running(const char* what) {
  if (current == nullptr) fail(std::string(what) + " outside of a kernel");
  return *current;
}

void suspend(Thread& thread, Wait wait) {
  thread.wait = wait;
  thread.fibre->suspend();
}

// The thread that releases the others does not wait itself: it goes on without a turn.
void make_ready(Block& block, Wait from) {
  for (Thread& thread : block.threads) {
    if (thread.wait != from) continue;
    thread.wait = Wait::none;
    block.warps[thread.number / warp_size].ready |= 1u << (thread.number % warp_size);
  }
}

void Scheduler::prepare(Block& block) {
  const dim3 size = launch_->block;
  const unsigned count = size.x * size.y * size.z;
  block.started = false;
  block.arrived = 0;
  block.barrier = CallSite{"", 0};
  block.live = count;
  block.warps.clear();
  for (unsigned first = 0; first < count; first += warp_size) {
    const unsigned lanes = count - first;
    const unsigned mask = lanes >= warp_size ? ~0u : (1u << lanes) - 1;
    block.warps.push_back(Warp{mask, mask});
  }
  block.threads.resize(count);
  uint3 index{0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    Thread fresh{};
    fresh.fibre = &pooled_fibre(std::size_t{block.rank} * count + i);
    fresh.block = &block;
    fresh.number = i;
    fresh.index = index;
    block.threads[i] = fresh;
    fresh.fibre->start(
        [](void* arguments) {
          const Launch& launch = *static_cast<const Launch*>(arguments);
          launch.call(launch.arguments);
          current->exited = true;
        },
        const_cast<Launch*>(launch_));
    if (++index.x == size.x) {
      index.x = 0;
      if (++index.y == size.y) {
        index.y = 0;
        ++index.z;
      }
    }
  }
  if (posix_memalign(&block.shared, 16, launch_->shared_bytes) != 0) {
    fail("no memory for a block's shared memory");
  }
  if (launch_->shared_bytes != 0) {
    std::memset(block.shared, 0xff, launch_->shared_bytes);
  } else {
    ASAN_POISON_MEMORY_REGION(block.shared, 1);  // an allocation of nothing has a byte
  }
}

// Nobody may touch a block's memory between its exit and that of the cluster's last block.
// AddressSanitizer sees who does; without it a read finds 0xff, and a write is found here.
void Scheduler::release_memory(Block& block) {
  const std::size_t bytes = launch_->shared_bytes;
  ASAN_UNPOISON_MEMORY_REGION(block.shared, bytes != 0 ? bytes : 1);
  const unsigned char* byte = static_cast<const unsigned char*>(block.shared);
  if (cluster_.blocks.size() > 1 && bytes != 0 &&
      (byte[0] != 0xff || std::memcmp(byte, byte + 1, bytes - 1) != 0)) {
    fail("the shared memory of block " + text(block.index) +
         " was written after the block had exited");
  }
  std::free(block.shared);
  block.shared = nullptr;
}

void Scheduler::run(const Launch& launch) {
  launch_ = &launch;
  current_launch = &launch;
  blockDim = launch.block;
  gridDim = launch.grid;

  const dim3 size = launch.cluster;
  const dim3 clusters(launch.grid.x / size.x, launch.grid.y / size.y, launch.grid.z / size.z);
  const std::uint64_t count = std::uint64_t{clusters.x} * clusters.y * clusters.z;
  const std::uint64_t blocks = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;

  const std::uint64_t launches = record_.launches + 1;
  previous_record_ = std::exchange(record_, LastLaunch{});
  record_.grid = launch.grid;
  record_.block = launch.block;
  record_.cluster = launch.cluster;
  record_.shared_bytes = launch.shared_bytes;
  record_.stream = launch.stream;
  record_.device = launch.device;
  record_.programmatic = launch.programmatic;
  record_.kernel = launch.kernel;
  record_.block_barriers.assign(blocks, 0);
  record_.cluster_barriers.assign(blocks, 0);
  record_.launches = launches;

  // Kernels compute in the default environment, whatever the host's is.
  std::fenv_t environment;
  std::fegetenv(&environment);
  std::fesetenv(FE_DFL_ENV);

  // A step that has no divisor in common with the count visits each cluster once.
  std::uint64_t first = 0;
  std::uint64_t step = 1;
  if (!in_order_) {
    first = random_.below(count);
    do {
      step = 1 + random_.below(count);
    } while (std::gcd(step, count) != 1);
  }
  const unsigned in_cluster = size.x * size.y * size.z;
  cluster_.blocks.resize(in_cluster);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t number = (first + i * step) % count;
    const uint3 origin{static_cast<unsigned>(number % clusters.x) * size.x,
                       static_cast<unsigned>(number / clusters.x % clusters.y) * size.y,
                       static_cast<unsigned>(number / clusters.x / clusters.y) * size.z};
    for (unsigned rank = 0; rank < in_cluster; ++rank) {
      Block& block = cluster_.blocks[rank];
      block.index = uint3{origin.x + rank % size.x, origin.y + rank / size.x % size.y,
                          origin.z + rank / size.x / size.y};
      block.number =
          block.index.x +
          std::size_t{launch.grid.x} * (block.index.y + std::size_t{launch.grid.y} * block.index.z);
      block.rank = rank;
      block.cluster = &cluster_;
    }
    run_cluster();
  }

  std::fesetenv(&environment);
  current_launch = nullptr;
  launch_ = nullptr;
}

void Scheduler::run_cluster() {
  for (Block& block : cluster_.blocks) prepare(block);
  cluster_.threads = static_cast<unsigned>(cluster_.blocks.size()) * cluster_.blocks[0].live;
  cluster_.arrived = 0;
  cluster_.phase = 0;
  cluster_.live = cluster_.threads;
  while (cluster_.live != 0) {
    Block* block = choose_block();
    if (block == nullptr) report_deadlock();
    run_turn(*block);
  }
  for (Block& block : cluster_.blocks) {
    record_.cluster_barriers[block.number] = static_cast<unsigned>(cluster_.phase);
    for (const Thread& thread : block.threads) {
      record_.waited_for_previous_grid += thread.waited_for_previous_grid;
      record_.allowed_next_grid += thread.allowed_next_grid;
    }
    release_memory(block);
  }
}

// In order, a block runs for as long as it can: one that needs another block to have started, or
// not to have exited yet, finds that it is not so.
Block* Scheduler::choose_block() {
  const std::size_t count = cluster_.blocks.size();
  const std::size_t first = in_order_ || count == 1 ? 0 : random_.below(count);
  for (std::size_t i = 0; i < count; ++i) {
    Block& block = cluster_.blocks[(first + i) % count];
    if (block.ready()) return &block;
  }
  return nullptr;
}

// In order, each warp runs for as long as it can alone, which also keeps its stacks in the cache.
// Otherwise all warps have a turn, or one has, or one for as long as it can.
void Scheduler::run_turn(Block& block) {
  if (in_order_) {
    for (Warp& warp : block.warps) run_warp(block, warp);
    return;
  }
  const std::size_t count = block.warps.size();
  const std::uint64_t kind = random_.below(4);
  if (kind == 0) {
    for (Warp& warp : block.warps) collect(block, warp);
    run_collected();
    return;
  }
  std::size_t chosen = random_.below(count);
  while (block.warps[chosen].ready == 0) chosen = (chosen + 1) % count;
  if (kind == 1) {
    collect(block, block.warps[chosen]);
    run_collected();
  } else {
    run_warp(block, block.warps[chosen]);
  }
}

void Scheduler::run_warp(Block& block, Warp& warp) {
  while (warp.ready != 0) {
    collect(block, warp);
    run_collected();
  }
}

void Scheduler::collect(Block& block, Warp& warp) {
  Thread* threads =
      &block.threads[static_cast<std::size_t>(&warp - block.warps.data()) * warp_size];
  for (unsigned lanes = warp.ready; lanes != 0; lanes &= lanes - 1) {
    turn_.push_back(&threads[__builtin_ctz(lanes)]);
  }
  warp.ready = 0;
}

void Scheduler::run_collected() {
  if (!in_order_) random_.shuffle(turn_);
  for (Thread* thread : turn_) run_thread(*thread);
  turn_.clear();
}

void Scheduler::run_thread(Thread& thread) {
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  current = &thread;
  thread.block->started = true;
  thread.fibre->resume();
  if (thread.exited) finish(thread);
  current = nullptr;
}

void Scheduler::finish(Thread& thread) {
  Block& block = *thread.block;
  block.warps[thread.number / warp_size].exited |= 1u << (thread.number % warp_size);
  --cluster_.live;
  if (--block.live != 0 || cluster_.blocks.size() == 1) return;
  if (launch_->shared_bytes != 0) std::memset(block.shared, 0xff, launch_->shared_bytes);
  ASAN_POISON_MEMORY_REGION(block.shared, launch_->shared_bytes);
}

void Scheduler::report_deadlock() const {
  std::string message = "no thread can go on in a grid of " + text(launch_->grid) + ", blocks of " +
                        text(launch_->block) + ", clusters of " + text(launch_->cluster) + ":";
  for (const Block& block : cluster_.blocks) message += describe(block);
  fail(message);
}

// Every lane of the mask waits in this operation with this mask.
bool complete(const Thread* lanes, const Warp& warp, const Thread& last) {
  if ((warp.in_operation & last.mask) != last.mask) return false;
  for (unsigned left = last.mask; left != 0; left &= left - 1) {
    const Thread& other = lanes[__builtin_ctz(left)];
    if (other.mask != last.mask || other.operation != last.operation) return false;
  }
  return true;
}

void exchange(Thread* lanes, const Thread& last) {
  const unsigned mask = last.mask;
  std::uint64_t ballot = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left);
    if (!same(lanes[i].site, last.site)) {
      fail("a warp operation at " + text(last.site) + " that lane " + std::to_string(i) +
           " calls at " + text(lanes[i].site));
    }
    if (lanes[i].value != 0) ballot |= std::uint64_t{1} << i;
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    Thread& lane = lanes[__builtin_ctz(left)];
    switch (last.operation) {
      case WarpOperation::sync: break;
      case WarpOperation::any:
      case WarpOperation::ballot: lane.result = ballot; break;
      case WarpOperation::shuffle_32:
      case WarpOperation::shuffle_64:
      case WarpOperation::shuffle_xor_32:
      case WarpOperation::shuffle_xor_64:
        if (lane.source >= warp_size || (mask >> lane.source & 1u) == 0) {
          fail("a shuffle at " + text(last.site) + " by which thread " + text(lane.index) +
               " reads lane " + std::to_string(lane.source) + ", which the mask does not name");
        }
        lane.result = lanes[lane.source].value;
        break;
    }
  }
}

}  // namespace

void* shared_memory() { return running("shared memory").block->shared; }

unsigned lane() { return running("a lane").number % warp_size; }

void block_barrier(CallSite site) {
  Thread& thread = running("__syncthreads");
  Block& block = *thread.block;
  thread.site = site;
  if (block.arrived == 0) {
    block.barrier = site;
  } else if (!same(block.barrier, site)) {
    fail("divergent barriers: __syncthreads at " + text(site) +
         " while others of the block wait at " + text(block.barrier));
  }
  if (++block.arrived != block.threads.size()) {
    suspend(thread, Wait::block_barrier);
    return;
  }
  block.arrived = 0;
  ++scheduler.record().block_barriers[block.number];
  make_ready(block, Wait::block_barrier);
}

std::uint64_t warp_operation(WarpOperation operation, unsigned mask, std::uint64_t value,
                             unsigned source, CallSite site) {
  Thread& thread = running("a warp operation");
  const unsigned first = thread.number / warp_size * warp_size;
  Thread* lanes = &thread.block->threads[first];
  Warp& warp = thread.block->warps[thread.number / warp_size];
  const unsigned self = 1u << (thread.number - first);
  thread.site = site;
  if ((mask & self) == 0) {
    fail("a warp operation at " + text(site) + " whose mask does not name the calling lane");
  }
  if ((mask & ~warp.lanes) != 0) {
    fail("a warp operation at " + text(site) + " whose mask names lanes beyond the block's end");
  }
  if ((mask & warp.exited) != 0) {
    fail("a warp operation at " + text(site) + " whose mask names lanes that have exited");
  }
  thread.operation = operation;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  warp.in_operation |= self;
  if (!complete(lanes, warp, thread)) {
    suspend(thread, Wait::warp_operation);
    return thread.result;
  }
  exchange(lanes, thread);
  warp.in_operation &= ~mask;
  for (unsigned left = mask & ~self; left != 0; left &= left - 1) {
    lanes[__builtin_ctz(left)].wait = Wait::none;
  }
  warp.ready |= mask & ~self;
  return thread.result;
}

void cluster_arrive(CallSite site) {
  Thread& thread = running("a cluster's barrier");
  Cluster& cluster = *thread.block->cluster;
  thread.site = site;
  if (thread.arrived_at_cluster) {
    fail("arrives at the cluster's barrier at " + text(site) + " again without having waited");
  }
  thread.arrived_at_cluster = true;
  thread.cluster_phase = cluster.phase;
  if (++cluster.arrived != cluster.threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Block& block : cluster.blocks) make_ready(block, Wait::cluster_barrier);
}

void cluster_wait(CallSite site) {
  Thread& thread = running("a cluster's barrier");
  thread.site = site;
  if (!thread.arrived_at_cluster) {
    fail("waits at the cluster's barrier at " + text(site) + " without having arrived");
  }
  thread.arrived_at_cluster = false;
  if (thread.block->cluster->phase == thread.cluster_phase) suspend(thread, Wait::cluster_barrier);
}

unsigned cluster_rank() { return running("a cluster's rank").block->rank; }

unsigned cluster_size() {
  return static_cast<unsigned>(running("a cluster's size").block->cluster->blocks.size());
}

void* map_shared(void* p, unsigned rank, CallSite site) {
  Block& own = *running("a mapping of shared memory").block;
  if (rank >= own.cluster->blocks.size()) {
    fail("maps shared memory at " + text(site) + " to rank " + std::to_string(rank) +
         ", which the cluster does not have");
  }
  const std::uintptr_t offset =
      reinterpret_cast<std::uintptr_t>(p) - reinterpret_cast<std::uintptr_t>(own.shared);
  if (offset > current_launch->shared_bytes) {
    fail("maps at " + text(site) + " an address that is not in its block's shared memory");
  }
  const Block& other = own.cluster->blocks[rank];
  if (!other.started || other.live == 0) {
    fail("maps shared memory at " + text(site) + " to rank " + std::to_string(rank) +
         (other.started ? ", which has exited" : ", which may not have started"));
  }
  return static_cast<char*>(other.shared) + offset;
}

void wait_for_previous_grid() {
  scheduler.finish_previous_grid();
  running("cudaGridDependencySynchronize").waited_for_previous_grid = true;
}

void allow_next_grid() {
  running("cudaTriggerProgrammaticLaunchCompletion").allowed_next_grid = true;
}

void fail(const char* message, CallSite site) { fail(std::string(message) + " at " + text(site)); }

bool in_kernel() { return current != nullptr; }

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  scheduler.run(launch);
}

void set_seed(std::uint64_t seed) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  scheduler.set_seed(seed);
}

void finish_previous_grid_late(std::function<void()> work) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  scheduler.set_previous_grid(std::move(work));
}

LastLaunch last_launch() {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  return scheduler.record();
}

LastLaunch launch_before_last() {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  return scheduler.previous_record();
}

}  // namespace cuda_emulation
