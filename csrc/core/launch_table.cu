#include "core/launch_table.cuh"

namespace fusereg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::size_t kWord = sizeof(uint4);
constexpr int kMaxWords = static_cast<int>((kMaxKernelParamBytes - 64) / kWord);

struct Piece {
  uint4* to;
  int count;
  uint4 words[kMaxWords];
};

__global__ void __launch_bounds__(kThreads) write_table_kernel(FUSEREG_GRID_CONSTANT(Piece, p)) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < p.count) p.to[i] = p.words[i];
}

}  // namespace

void write_table(const char* op, TableMemory& memory, Stream stream) {
  const std::size_t size = memory.next.size();
  const unsigned char* const next = memory.next.data();
  std::size_t begin = 0;
  std::size_t end = size;
  if (memory.held.size() == size) {
    const unsigned char* const held = memory.held.data();
    if (std::memcmp(held, next, size) == 0) return;
    while (std::memcmp(held + begin, next + begin, kWord) == 0) begin += kWord;
    while (std::memcmp(held + end - kWord, next + end - kWord, kWord) == 0) end -= kWord;
  }
  memory.held.clear();  // not to be trusted if a launch fails
  Piece piece;
  for (; begin < end; begin += static_cast<std::size_t>(piece.count) * kWord) {
    piece.to = reinterpret_cast<uint4*>(static_cast<unsigned char*>(memory.data) + begin);
    piece.count = static_cast<int>(std::min<std::size_t>((end - begin) / kWord, kMaxWords));
    std::memcpy(piece.words, next + begin, static_cast<std::size_t>(piece.count) * kWord);
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(ceil_div(piece.count, kThreads)));
    config.block = dim3(kThreads);
    config.stream = stream;
    launch(op, &write_table_kernel, config, piece);
  }
  memory.held.swap(memory.next);
}

}  // namespace fusereg::cuda
