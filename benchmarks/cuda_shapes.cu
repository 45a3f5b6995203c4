// Which share of a row a thread should hold: times the packed forward kernels for every way to
// divide a row among threads, beside the one that row_shape() takes, so that its constants can be
// set by measurement.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I include benchmarks/cuda_shapes.cu -o cuda_shapes
//   ./cuda_shapes [SECONDS]
//
// One line for each configuration: threads of a block for one row x vectors of 16 bytes that a
// thread holds (0: the row is staged in shared memory) x blocks of a cluster, rows a block. Times
// are medians over interleaved replays of graphs whose calls go round more memory than the L2 cache
// holds; GB/s counts bytes read and written once. The last table compares what row_shape() takes
// with the best. Then single rows in a graph, as in decoding, launched the ordinary way and
// programmatically.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "rmsnorm/cuda.cuh"

namespace {

namespace detail = rmsnorm::cuda::detail;
using detail::RowShape;
using rmsnorm::DType;
using rmsnorm::cuda::LaunchOptions;

constexpr int rounds = 9;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { require(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data_); }
  char* at(std::size_t offset) const { return static_cast<char*>(data_) + offset; }

 private:
  void* data_ = nullptr;
};

// Numbers between 0.5 and 2 of either sign, of float or bfloat16: zeros and NaNs are no load.
__global__ void fill_with_numbers(unsigned* words, std::size_t count, DType dtype) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    unsigned bits = static_cast<unsigned>(i) * 2654435761u;
    bits ^= bits >> 15;
    bits *= 2246822519u;
    bits ^= bits >> 13;
    words[i] = dtype == DType::f32 ? (bits & 0x80ffffffu) | 0x3f000000u
                                   : (bits & 0x80ff80ffu) | 0x3f003f00u;
  }
}

using Enqueue = std::function<cudaError_t(cudaStream_t, int)>;

// `calls` calls, numbered, as one graph.
class Replay {
 public:
  Replay(cudaStream_t stream, int calls, const Enqueue& enqueue) : stream_(stream), calls_(calls) {
    error_ = enqueue(stream, 0);
    if (error_ == cudaSuccess) error_ = cudaStreamSynchronize(stream);
    if (error_ != cudaSuccess) {
      cudaGetLastError();
      return;
    }
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of capture");
    for (int i = 0; i < calls; ++i) require(enqueue(stream, i), "captured call");
    cudaGraph_t graph;
    require(cudaStreamEndCapture(stream, &graph), "end of capture");
    require(cudaGraphInstantiate(&executable_, graph, 0), "instantiation");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  ~Replay() {
    if (error_ != cudaSuccess) return;
    cudaGraphExecDestroy(executable_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  cudaError_t error() const { return error_; }
  void run() {
    require(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    require(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch");
    require(cudaEventRecord(end_, stream_), "cudaEventRecord");
    require(cudaEventSynchronize(end_), "replay");
    float milliseconds = 0;
    require(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    times_.push_back(milliseconds * 1e3 / calls_);
  }
  // Microseconds of a call.
  double median() {
    std::sort(times_.begin(), times_.end());
    return times_[times_.size() / 2];
  }

 private:
  cudaStream_t stream_;
  int calls_;
  cudaError_t error_;
  cudaGraphExec_t executable_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::vector<double> times_;
};

std::vector<double> interleaved_medians(const std::vector<std::unique_ptr<Replay>>& replays) {
  for (const auto& replay : replays) replay->run();
  for (int round = 0; round < rounds; ++round) {
    for (const auto& replay : replays) replay->run();
  }
  std::vector<double> medians;
  for (const auto& replay : replays) medians.push_back(replay->median());
  return medians;
}

struct Problem {
  DType dtype;
  bool adds_residual;
  std::int64_t n;
  std::int64_t rows;
  int sets;  // of memory, taken in turn

  std::size_t tensor_bytes() const {
    return static_cast<std::size_t>(rows * n * rmsnorm::size_in_bytes(dtype));
  }
  std::size_t call_bytes() const { return tensor_bytes() * (adds_residual ? 4 : 2); }
  std::int64_t vectors() const { return n * rmsnorm::size_in_bytes(dtype) / 16; }
};

std::string text_of(const RowShape& s) {
  char text[64];
  std::snprintf(text, sizeof text, "%3d x %d x %d, %2d rows", s.threads, s.vectors, s.cluster,
                s.rows_per_block);
  return text;
}

bool same(const RowShape& a, const RowShape& b) {
  return a.threads == b.threads && a.vectors == b.vectors && a.cluster == b.cluster &&
         a.rows_per_block == b.rows_per_block;
}

// Divisions of a row of that many vectors that leave at most half of the last places empty.
std::vector<RowShape> candidates(std::int64_t vectors, int version) {
  std::vector<RowShape> shapes;
  const auto add = [&](const RowShape& shape) {
    for (const RowShape& known : shapes) {
      if (same(known, shape)) return;
    }
    shapes.push_back(shape);
  };
  add(detail::row_shape(vectors, version));
  const int most_blocks = version >= detail::first_version_with_clusters ? detail::max_cluster : 1;
  for (const int held : {1, 2, 4, 8}) {
    for (int lanes = 4; lanes <= detail::warp_size; lanes *= 2) {
      const std::int64_t places = std::int64_t{lanes} * held;
      if (places < vectors || places >= 2 * vectors) continue;
      for (const int block : {64, 128, 256}) add({lanes, block / lanes, held, 1});
    }
    for (int cluster = 1; cluster <= most_blocks; cluster *= 2) {
      const std::int64_t each = std::int64_t{cluster} * held;
      const int threads = detail::round_up((vectors + each - 1) / each, detail::warp_size);
      if (threads < 2 * detail::warp_size || threads > detail::max_threads) continue;
      add({threads, 1, held, cluster});
    }
  }
  if (vectors >= 1024) {
    for (const int threads : {256, 512}) {
      for (int cluster = 1; cluster <= most_blocks; cluster *= 2) add({threads, 1, 0, cluster});
    }
  }
  return shapes;
}

template <class T, bool has_residual>
cudaError_t launch(const RowShape& shape, const rmsnorm::ForwardParams& p,
                   const detail::Launch& launch) {
  using Elements = detail::PackedElements<T, T, has_residual>;
  const rmsnorm::detail::RowLayout layout = detail::layout_of(p);
  const detail::PackedParams<float> a =
      detail::packed_params<float>(p, layout, Elements::width, launch.options);
  if (shape.vectors != 8) return detail::launch_packed<Elements>(shape, a, launch);
  return detail::launch_kernel<Elements>(detail::forward_in_registers<Elements, 8>, shape, a,
                                         detail::reduction_bytes(shape.threads, shape.cluster),
                                         launch);
}

cudaError_t launch(const Problem& problem, const RowShape& shape, const rmsnorm::ForwardParams& p,
                   const detail::Launch& arguments) {
  if (problem.dtype == DType::f32) {
    return problem.adds_residual ? launch<float, true>(shape, p, arguments)
                                 : launch<float, false>(shape, p, arguments);
  }
  return problem.adds_residual ? launch<rmsnorm::bfloat16, true>(shape, p, arguments)
                               : launch<rmsnorm::bfloat16, false>(shape, p, arguments);
}

rmsnorm::Tensor rows_of(const Problem& problem, char* data) {
  rmsnorm::Tensor t = rmsnorm::matrix(reinterpret_cast<float*>(data), problem.rows, problem.n);
  t.dtype = problem.dtype;
  return t;
}

struct Verdict {
  Problem problem;
  std::string chosen, best;
  double chosen_gb_per_s, best_gb_per_s, copy_gb_per_s;
};

class Program {
 public:
  explicit Program(double seconds) : seconds_(seconds) {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    require(cudaGetDevice(&device_), "cudaGetDevice");
    require(detail::architecture_of(device_, &architecture_), "architecture of the device");
    require(cudaDeviceGetAttribute(&cache_bytes_, cudaDevAttrL2CacheSize, device_), "L2 size");
  }
  ~Program() { cudaStreamDestroy(stream_); }

  bool has_time() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count() <
           seconds_;
  }

  Verdict measure(Problem problem) {
    const std::size_t bytes = problem.call_bytes();
    problem.sets = static_cast<int>(
        std::max<std::size_t>(2, 3 * static_cast<std::size_t>(cache_bytes_) / bytes + 1));
    // Half a millisecond or more, in whole turns.
    const std::size_t at_least = (std::size_t{1} << 30) / bytes + 1;
    const std::size_t sets = static_cast<std::size_t>(problem.sets);
    const int calls = static_cast<int>((at_least + sets - 1) / sets * sets);

    const std::size_t tensor = problem.tensor_bytes();
    const DeviceMemory memory(bytes * sets);
    const DeviceMemory weight(static_cast<std::size_t>(problem.n) * 4);
    fill_with_numbers<<<1024, 256, 0, stream_>>>(reinterpret_cast<unsigned*>(memory.at(0)),
                                                 bytes * sets / 4, problem.dtype);
    fill_with_numbers<<<1, 256, 0, stream_>>>(reinterpret_cast<unsigned*>(weight.at(0)),
                                              static_cast<std::size_t>(problem.n), problem.dtype);
    require(cudaGetLastError(), "filling");

    const auto params = [&](int call) {
      const std::size_t first = bytes * (static_cast<std::size_t>(call) % sets);
      rmsnorm::ForwardParams p;
      p.x = rows_of(problem, memory.at(first));
      p.y = rows_of(problem, memory.at(first + tensor));
      p.weight = rmsnorm::vector(reinterpret_cast<float*>(weight.at(0)), problem.n);
      p.weight.dtype = problem.dtype;
      if (problem.adds_residual) {
        p.residual = rows_of(problem, memory.at(first + 2 * tensor));
        p.residual_out = rows_of(problem, memory.at(first + 3 * tensor));
      }
      return p;
    };

    std::vector<RowShape> shapes;
    std::vector<std::unique_ptr<Replay>> replays;
    const Enqueue copy = [&](cudaStream_t stream, int call) {
      const std::size_t first = bytes * (static_cast<std::size_t>(call) % sets);
      return cudaMemcpyAsync(memory.at(first + bytes / 2), memory.at(first), bytes / 2,
                             cudaMemcpyDeviceToDevice, stream);
    };
    replays.push_back(std::make_unique<Replay>(stream_, calls, copy));
    require(replays.back()->error(), "copy");
    for (const RowShape& shape : candidates(problem.vectors(), architecture_.version)) {
      const detail::Launch arguments = {stream_, LaunchOptions(), device_, architecture_};
      auto replay = std::make_unique<Replay>(stream_, calls, [&](cudaStream_t, int call) {
        return launch(problem, shape, params(call), arguments);
      });
      if (replay->error() != cudaSuccess) {
        std::printf("  %s: %s\n", text_of(shape).c_str(), cudaGetErrorString(replay->error()));
        continue;
      }
      shapes.push_back(shape);
      replays.push_back(std::move(replay));
    }
    return report(problem, shapes, interleaved_medians(replays));
  }

  // One launch after another on rows of 4096 bf16, microseconds each.
  void decode() {
    std::printf("\ndecode, rows of 4096 bf16, us a launch in a graph\n");
    std::printf("%6s%12s%15s%18s\n", "rows", "ordinary", "programmatic", "constant weight");
    for (const std::int64_t rows : {1, 8, 64}) {
      const Problem problem = {DType::bf16, false, 4096, rows, 1};
      const DeviceMemory memory(2 * problem.tensor_bytes()), weight(2 * 4096);
      fill_with_numbers<<<64, 256, 0, stream_>>>(reinterpret_cast<unsigned*>(memory.at(0)),
                                                 2 * problem.tensor_bytes() / 4, DType::bf16);
      fill_with_numbers<<<1, 256, 0, stream_>>>(reinterpret_cast<unsigned*>(weight.at(0)), 2048,
                                                DType::bf16);
      std::vector<std::unique_ptr<Replay>> replays;
      for (const int kind : {0, 1, 2}) {
        LaunchOptions options;
        options.programmatic = kind > 0;
        options.constant_weight = kind > 1;
        replays.push_back(std::make_unique<Replay>(stream_, 500, [&](cudaStream_t s, int call) {
          // Each reads what the one before has written.
          const std::size_t half = problem.tensor_bytes();
          rmsnorm::ForwardParams p;
          p.x = rows_of(problem, memory.at(call % 2 == 0 ? 0 : half));
          p.y = rows_of(problem, memory.at(call % 2 == 0 ? half : 0));
          p.weight = rmsnorm::vector(reinterpret_cast<rmsnorm::bfloat16*>(weight.at(0)), problem.n);
          const rmsnorm::Status status = rmsnorm::cuda::forward(p, s, options);
          return status.ok() ? cudaSuccess : static_cast<cudaError_t>(status.cuda_error);
        }));
        require(replays.back()->error(), "decode");
      }
      const std::vector<double> us = interleaved_medians(replays);
      std::printf("%6lld%12.2f%15.2f%18.2f\n", static_cast<long long>(rows), us[0], us[1], us[2]);
    }
  }

 private:
  Verdict report(const Problem& problem, const std::vector<RowShape>& shapes,
                 const std::vector<double>& us) {
    const auto gb_per_s = [&](double t) {
      return static_cast<double>(problem.call_bytes()) / t / 1e3;
    };
    std::printf("\n%s %s, %lld rows of %lld (%lld vectors); a copy: %.0f GB/s\n",
                problem.adds_residual ? "add" : "norm", name(problem.dtype),
                static_cast<long long>(problem.rows), static_cast<long long>(problem.n),
                static_cast<long long>(problem.vectors()), gb_per_s(us[0]));
    Verdict v = {problem, "", "", 0, 0, gb_per_s(us[0])};
    const RowShape chosen = detail::row_shape(problem.vectors(), architecture_.version);
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      const double rate = gb_per_s(us[i + 1]);
      const bool is_chosen = same(shapes[i], chosen);
      std::printf("  %s%9.2f us%7.0f GB/s%s\n", text_of(shapes[i]).c_str(), us[i + 1], rate,
                  is_chosen ? "  <- row_shape" : "");
      if (is_chosen) v.chosen = text_of(shapes[i]), v.chosen_gb_per_s = rate;
      if (rate > v.best_gb_per_s) v.best = text_of(shapes[i]), v.best_gb_per_s = rate;
    }
    std::fflush(stdout);
    return v;
  }

  std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  double seconds_;
  cudaStream_t stream_ = nullptr;
  int device_ = 0, cache_bytes_ = 0;
  rmsnorm::cuda::Architecture architecture_ = {};
};

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1e9;
  if (!(seconds > 0)) {
    std::fprintf(stderr, "usage: cuda_shapes [SECONDS]\n");
    return 2;
  }
  Program program(seconds);
  program.decode();
  std::vector<Verdict> verdicts;
  int left_out = 0;
  for (const bool adds_residual : {false, true}) {
    for (const DType dtype : {DType::bf16, DType::f32}) {
      for (const std::int64_t n : {64, 128, 256, 512, 1024, 2048, 3072, 4096, 5120, 8192, 16384,
                                   32768, 65536, 131072, 262144}) {
        if (!program.has_time()) {
          ++left_out;
          continue;
        }
        // 64 MB a tensor: beyond the cache, and enough rows for every multiprocessor.
        const std::int64_t rows = (std::int64_t{64} << 20) / (n * rmsnorm::size_in_bytes(dtype));
        verdicts.push_back(program.measure({dtype, adds_residual, n, rows, 0}));
      }
    }
  }
  std::printf("\n%-5s%-10s%8s  %-24s%6s  %-24s%6s%6s\n", "", "", "n", "row_shape", "GB/s", "best",
              "GB/s", "copy");
  for (const Verdict& v : verdicts) {
    std::printf("%-5s%-10s%8lld  %-24s%6.0f  %-24s%6.0f%6.0f%s\n",
                v.problem.adds_residual ? "add" : "norm", name(v.problem.dtype),
                static_cast<long long>(v.problem.n), v.chosen.c_str(), v.chosen_gb_per_s,
                v.best.c_str(), v.best_gb_per_s, v.copy_gb_per_s,
                v.best_gb_per_s > 1.02 * v.chosen_gb_per_s ? "  better by more than 2 %" : "");
  }
  if (left_out > 0) std::printf("%d row lengths left out: no time left\n", left_out);
  return 0;
}
