// The NF4 codec, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
#include "nf4_decode.h"

namespace lora_kernels::cpu {
namespace {

template <class T>
float quantize_block(const T* weight, int64_t size, uint8_t* packed) {
  // Largest magnitude by bits: NaN is above infinity, which is above all others.
  vi32 most = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const vi32 bits = (vi32)load(weight + i) & 0x7fffffff;
    most = (vi32)select((vu32)(bits > most), (vu32)bits, (vu32)most);
  }
  T tail[kLanes] = {};
  if (i < size) {
    memcpy(tail, weight + i, (size - i) * sizeof(T));
    const vi32 bits = (vi32)load(tail) & 0x7fffffff;
    most = (vi32)select((vu32)(bits > most), (vu32)bits, (vu32)most);
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  float absmax;
  memcpy(&absmax, &largest, 4);
  const vf inverse = splat(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));

  auto codes_of = [&](vf v, uint8_t* codes) {
    const vf scaled = v * inverse;
    vi32 code = {};
#pragma GCC unroll 15
    for (int t = 0; t < 15; ++t) code -= (vi32)(scaled > splat((kCode[t] + kCode[t + 1]) / 2));
    typedef uint8_t vu8 __attribute__((vector_size(kLanes)));
    store_raw(codes, __builtin_convertvector(code, vu8));
  };
  for (int64_t first = 0; first < size; first += kChunk) {
    uint8_t codes[kChunk];
    const int64_t count = min64(kChunk, size - first);
    if (count == kChunk) {
      for (int v = 0; v < kChunkVecs; ++v) codes_of(load(weight + first + v * kLanes), codes + v * kLanes);
    } else {
      // Zeros follow the last element, as in the other implementations: an odd size leaves half a byte.
      T rest[kChunk] = {};
      memcpy(rest, weight + first, count * sizeof(T));
      for (int v = 0; v < kChunkVecs; ++v) codes_of(load(rest + v * kLanes), codes + v * kLanes);
    }
    uint8_t bytes[kChunk / 2];
    for (int j = 0; j < kChunk / 2; ++j) bytes[j] = (uint8_t)(codes[2 * j] << 4 | codes[2 * j + 1]);
    memcpy(packed + first / 2, bytes, (count + 1) / 2);
  }
  return absmax;
}

bool quantize(const Nf4Quantize& p) {
  const int64_t blocks = (p.size + p.block_size - 1) / p.block_size;
  const int threads = thread_count(p.num_threads, blocks, p.size, kMinMoves);
  with_type(p.weight_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * p.block_size;
      p.absmax[block] =
          quantize_block((const T*)p.weight + first, min64(p.block_size, p.size - first), p.packed + first / 2);
    }
  });
  return true;
}

bool quantize_absmax(const Nf4QuantizeAbsmax& p) {
  for (int64_t first = 0; first < p.blocks; first += kAbsmaxBlock) {
    const int64_t last = min64(p.blocks, first + kAbsmaxBlock);
    float largest = 0;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = __builtin_fabsf(p.absmax[i] - p.absmax_offset);
      largest = magnitude > largest ? magnitude : largest;
    }
    p.absmax_scale[first / kAbsmaxBlock] = largest;
    const float inverse = 1.0f / (largest < kSmallestAbsmax ? kSmallestAbsmax : largest);
    for (int64_t i = first; i < last; ++i) {
      const float scaled = (p.absmax[i] - p.absmax_offset) * inverse;
      int code = 0;  // the number of midpoints below `scaled`
      for (int step = 128; step; step /= 2)
        if (scaled > (p.absmax_code[code + step - 1] + p.absmax_code[code + step]) / 2) code += step;
      p.codes[i] = (uint8_t)code;
    }
  }
  return true;
}

bool dequantize(const Nf4Dequantize& p) {
  const int64_t cols = p.col_last - p.col_first, rows = p.row_last - p.row_first;
  const int threads = thread_count(p.num_threads, rows, rows * cols, kMinMoves);
  with_type(p.out_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
      decode_row(p.weight, p.row_first + row, p.col_first, p.col_last, (T*)p.out + row * p.ld_out);
  });
  return true;
}

}  // namespace

extern const Nf4Kernels LK_CONCAT(nf4_, LK_ISA);
const Nf4Kernels LK_CONCAT(nf4_, LK_ISA) = {quantize, quantize_absmax, dequantize};

}  // namespace lora_kernels::cpu
