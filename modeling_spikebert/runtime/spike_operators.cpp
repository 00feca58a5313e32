// SPDX-License-Identifier: Apache-2.0
// What spikes save, as operators of ONNX Runtime: each is a function in an exported int8 graph, made of standard
// operators, and ONNX Runtime takes these in the place of the functions where this library is registered.
//
// Shapes: T time steps, B batch, L tokens, D hidden, H heads, K inputs and M outputs of a Linear, R rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __AVX512BW__
constexpr int64_t BYTES = 64;  // of a register
#else
constexpr int64_t BYTES = 32;
#endif
constexpr int64_t HALF = BYTES / 2, WIDE = 4, TILE = BYTES * WIDE;  // columns that are summed at once, in registers
constexpr int64_t MOST = 256;                                       // weights whose sum fits into 16 bits
constexpr int64_t ROWS = 32;                                        // rows that share a tile of weights in the cache
constexpr int64_t LINE = 64;                                        // bytes of a cache line
typedef int16_t Words __attribute__((vector_size(BYTES)));
typedef uint8_t Bytes8 __attribute__((vector_size(8)));
typedef int32_t Ints8 __attribute__((vector_size(32), aligned(4)));

// ONNX Runtime's C interface, of which only the order of its functions is fixed: places in its table (API version 17).
using Api = void* const*;
enum Place { CREATE_DOMAIN = 26, ADD_OPERATOR = 27, ADD_DOMAIN = 28, DATA = 51, RANK = 61, SIZES = 62, SHAPE = 65,
             FLOAT_ATTRIBUTE = 85, INT_ATTRIBUTE = 86, INPUT = 90, OUTPUT = 91, FREE_SHAPE = 99, CONSTANT_INPUT = 249,
             PARALLEL_FOR = 274 };
template <class Result = void*, class... Args>
static Result call(Api api, Place place, Args... args) {
  return reinterpret_cast<Result (*)(Args...)>(api[place])(args...);
}

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> sizes;
  int64_t rows(int64_t last = 1) const {  // all sizes but the `last` ones, multiplied
    int64_t product = 1;
    for (size_t i = 0; i + last < sizes.size(); ++i) product *= sizes[i];
    return product;
  }
};

static Tensor tensor_of(Api api, const void* value) {
  Tensor x;
  if (!value) return x;
  void* shape;
  size_t rank;
  call(api, SHAPE, value, &shape);
  call(api, RANK, shape, &rank);
  x.sizes.resize(rank);
  call(api, SIZES, shape, x.sizes.data(), rank);
  call<void>(api, FREE_SHAPE, shape);
  call(api, DATA, value, &x.data);
  return x;
}

struct Context {
  Api api;
  void* context;
  Tensor input(size_t i) const {
    const void* value = nullptr;
    call(api, INPUT, context, i, &value);
    return tensor_of(api, value);
  }
  void* output(const std::vector<int64_t>& sizes) const {
    void *value, *data;
    call(api, OUTPUT, context, size_t(0), sizes.data(), sizes.size(), &value);
    call(api, DATA, value, &data);
    return data;
  }
  template <class Work>
  void parallel(int64_t tasks, const Work& work) const {
    void (*run)(void*, size_t) = [](void* data, size_t task) { (*static_cast<const Work*>(data))(task); };
    call(api, PARALLEL_FOR, context, run, size_t(tasks), size_t(0), (void*)&work);
  }
};

// For each byte the places of the bits that are set.
struct Places {
  uint8_t of[256][8] = {};
  constexpr Places() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, n = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte][n++] = bit;
  }
};
constexpr Places PLACES;

// Which of `size` neurons fired, times `factor`; a count stands there so many times. The first element is their number.
static void find(const uint8_t* spikes, int64_t size, int32_t factor, std::vector<int32_t>& fired) {
  fired.resize(std::max<size_t>(fired.size(), size + 9));
  int32_t* next = fired.data() + 1;
  auto again = [&](int64_t k) {
    const int64_t done = next - fired.data();
    fired.resize(std::max<size_t>(fired.size(), done + spikes[k] + size - k + 8));
    next = std::fill_n(fired.data() + done, spikes[k], k * factor);
  };
  int64_t k = 0;
  for (; k + 8 <= size; k += 8) {
    uint64_t eight;
    std::memcpy(&eight, spikes + k, 8);
    if (eight & ~0x0101010101010101ull) {
      for (int64_t i = k; i < k + 8; ++i) again(i);
      continue;
    }
    const uint8_t bits = eight * 0x0102040810204080ull >> 56;
    Bytes8 places;
    std::memcpy(&places, PLACES.of[bits], 8);
    *(Ints8*)next = (__builtin_convertvector(places, Ints8) + int32_t(k)) * factor;
    next += std::popcount(bits);
  }
  for (; k < size; ++k) again(k);
  fired[0] = next - fired.data() - 1;
}

// SpikeLinear: spikes [..., K], bools or bytes (a count adds a weight so many times); weight [K, M], int8; scale and bias [M].
// Gives scale * sum of weight[k] over the k that fired + bias, [..., M]. Silent synapses are passed over.
struct SpikeLinear {
  static constexpr const char* NAME = "SpikeLinear";
  static constexpr int INPUTS[] = {0, 3, 1, 1}, OUTPUT_TYPE = 1;  // types: 0 any, 1 float, 3 int8, 9 bool
  static constexpr size_t NEEDED = 4;
  int64_t inner, columns, tiles;
  std::shared_ptr<uint8_t[]> memory;
  uint8_t* packed;  // [tiles, K, TILE], from a cache line on; a 16-bit word has a column of the lower half of a
                    // register, plus 128, in its lower byte, and one of the upper half in its upper byte

  SpikeLinear(Api api, const void* info) {
    int constant;
    const void* value = nullptr;
    call(api, CONSTANT_INPUT, info, size_t(1), &constant, &value);
    const Tensor weight = tensor_of(api, value);
    inner = weight.sizes[0], columns = weight.sizes[1], tiles = (columns + TILE - 1) / TILE;
    static std::mutex mutex;
    static std::map<const void*, std::weak_ptr<uint8_t[]>> known;  // the branches of a graph share weights
    const std::lock_guard lock(mutex);
    memory = known[weight.data].lock();
    const bool is_new = !memory;
    if (is_new) known[weight.data] = memory = std::shared_ptr<uint8_t[]>(new uint8_t[tiles * inner * TILE + LINE]());
    packed = memory.get() + (LINE - uintptr_t(memory.get()) % LINE) % LINE;
    if (is_new) pack(static_cast<const int8_t*>(weight.data));
  }

  void pack(const int8_t* weight) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t c = 0; c < columns; ++c) {
        uint8_t* words = packed + (c / TILE * inner + k) * TILE + c % TILE / BYTES * BYTES;
        const int64_t place = c % BYTES;
        const int8_t w = weight[k * columns + c];
        words[place < HALF ? 2 * place : 2 * (place - HALF) + 1] = place < HALF ? w + 128 : w;
      }
  }

  void compute(const Context& context) const {
    Tensor spikes = context.input(0);
    const int64_t rows = spikes.rows(), blocks = (rows + ROWS - 1) / ROWS;
    const float *scale = (float*)context.input(2).data, *bias = (float*)context.input(3).data;
    spikes.sizes.back() = columns;
    float* out = (float*)context.output(spikes.sizes);
    const int64_t groups = blocks > 1 ? 1 : std::min<int64_t>(tiles, 4);  // of few rows each task takes some tiles
    context.parallel(blocks * groups, [&](int64_t task) {
      const int64_t begin = task / groups * ROWS, end = std::min(rows, begin + ROWS);
      const int64_t first = task % groups * tiles / groups, last = (task % groups + 1) * tiles / groups;
      thread_local std::vector<int32_t> fired[ROWS];
      for (int64_t r = begin; r < end; ++r) {
        prefetch(first, r - begin, end - begin);
        find((const uint8_t*)spikes.data + r * inner, inner, TILE, fired[r - begin]);
      }
      for (int64_t tile = first; tile < last; ++tile)
        for (int64_t r = begin; r < end; ++r) {
          if (tile + 1 < last) prefetch(tile + 1, r - begin, end - begin);
          alignas(BYTES) float sums[TILE];
          sum(fired[r - begin], packed + tile * inner * TILE, sums);
          const int64_t start = tile * TILE, size = std::min(TILE, columns - start);
          for (int64_t c = 0; c < size; ++c)
            out[r * columns + start + c] = sums[c] * scale[start + c] + bias[start + c];
        }
    });
  }

  // Of a tile that comes next, this part.
  void prefetch(int64_t tile, int64_t part, int64_t parts) const {
    const int64_t lines = inner * TILE / LINE;
    for (int64_t i = part * lines / parts; i < (part + 1) * lines / parts; ++i)
      __builtin_prefetch(packed + tile * inner * TILE + i * LINE);
  }

  static void sum(const std::vector<int32_t>& fired, const uint8_t* tile, float* sums) {
    const int32_t count = fired[0], *place = fired.data() + 1;
    for (int32_t first = 0; first == 0 || first < count; first += MOST) {
      const int32_t last = std::min<int32_t>(count, first + MOST);
      Words both[WIDE] = {}, upper[WIDE] = {};
      for (int32_t j = first; j < last; ++j)
        for (int64_t i = 0; i < WIDE; ++i) {
          const Words two = *(const Words*)(tile + place[j] + BYTES * i);
          both[i] += two;
          upper[i] += two >> 8;
        }
      int16_t part[TILE];
      for (int64_t i = 0; i < WIDE; ++i) {
        const Words lower = both[i] - (upper[i] << 8) - int16_t(128 * (last - first));  // modulo 2^16, as it fits
        std::memcpy(part + BYTES * i, &lower, BYTES);
        std::memcpy(part + BYTES * i + HALF, &upper[i], BYTES);
      }
      for (int64_t c = 0; c < TILE; ++c) sums[c] = first ? sums[c] + part[c] : part[c];
    }
  }
};

// SpikeNeuron: currents [T or 1, ..., D]; weight and bias of the norm [D]. SpikeNeurons: of G kinds of neurons,
// [T or 1, ..., G, D] and [G, D]. Gives spikes [T, ..., G, D]. A step is h = u * keep + norm(current); it fires at `threshold`, and u
// becomes h - drop, or 0 where `drop` is 0.
struct SpikeNeuron {
  static constexpr const char* NAME = "SpikeNeuron";
  static constexpr int INPUTS[] = {1, 1, 1}, OUTPUT_TYPE = 9;
  static constexpr size_t NEEDED = 3;
  int64_t steps;
  float epsilon, keep, threshold, drop;

  SpikeNeuron(Api api, const void* info) {
    call(api, INT_ATTRIBUTE, info, "steps", &steps);
    call(api, FLOAT_ATTRIBUTE, info, "epsilon", &epsilon);
    call(api, FLOAT_ATTRIBUTE, info, "keep", &keep);
    call(api, FLOAT_ATTRIBUTE, info, "threshold", &threshold);
    call(api, FLOAT_ATTRIBUTE, info, "drop", &drop);
  }

  void compute(const Context& context) const {
    Tensor current = context.input(0);
    const Tensor weight = context.input(1);
    const float *w = (float*)weight.data, *b = (float*)context.input(2).data, *x = (float*)current.data;
    const int64_t size = current.sizes.back(), groups = weight.rows(), given = current.sizes[0];
    const int64_t rows = current.rows() / given;  // of a step
    current.sizes[0] = steps;
    uint8_t* out = (uint8_t*)context.output(current.sizes);
    context.parallel((rows + ROWS - 1) / ROWS, [&](int64_t task) {
      thread_local std::vector<float> membrane;
      membrane.resize(size);
      for (int64_t r = task * ROWS; r < std::min(rows, (task + 1) * ROWS); ++r) {
        const int64_t group = r % groups * size;
        float mean = 0, factor = 0;
        for (int64_t t = 0; t < steps; ++t) {
          const float* row = x + ((given == 1 ? 0 : t) * rows + r) * size;
          if (t == 0 || given > 1) moments(row, size, mean, factor);
          step(row, mean, factor, w + group, b + group, size, t, membrane.data(), out + (t * rows + r) * size);
        }
      }
    });
  }

  void step(const float* __restrict x, const float mean, const float factor, const float* __restrict scale,
            const float* __restrict shift, const int64_t size, const int64_t t, float* __restrict u,
            uint8_t* __restrict spikes) const {
    const float level = threshold, kept = t ? keep : 0, lower = drop, reset = drop ? 1 : 0;
    if (steps == 1)
      for (int64_t i = 0; i < size; ++i) spikes[i] = (x[i] - mean) * factor * scale[i] + shift[i] >= level;
    else
      for (int64_t i = 0; i < size; ++i) {
        const float h = (t ? u[i] * kept : 0) + ((x[i] - mean) * factor * scale[i] + shift[i]);
        spikes[i] = h >= level;
        u[i] = h >= level ? (h - lower) * reset : h;
      }
  }

  void moments(const float* x, int64_t size, float& mean, float& factor) const {
    mean = sum(size, [&](int64_t i) { return x[i]; }) / size;
    const float variance = sum(size, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / size;
    factor = 1 / std::sqrt(variance + epsilon);
  }

  template <class Value>
  static float sum(int64_t size, const Value& value) {  // several sums at once, which fit into registers
    constexpr int64_t LANES = 2 * BYTES / sizeof(float);
    float lanes[LANES] = {}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
      for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += value(i + lane);
    for (; i < size; ++i) total += value(i);
    for (float lane : lanes) total += lane;
    return total;
  }
};

struct SpikeNeurons : SpikeNeuron {
  static constexpr const char* NAME = "SpikeNeurons";
  using SpikeNeuron::SpikeNeuron;
};

// SpikeAttention: spikes of query, key and value [T, B, L, 3, D]; optionally a mask [B, L]. Gives
// q (k^T v) of each head, [T, B, L, D], where what the mask leaves out is silent.
struct SpikeAttention {
  static constexpr const char* NAME = "SpikeAttention";
  static constexpr int INPUTS[] = {9, 9}, OUTPUT_TYPE = 1;
  static constexpr size_t NEEDED = 1;
  int64_t heads;

  SpikeAttention(Api api, const void* info) { call(api, INT_ATTRIBUTE, info, "heads", &heads); }

  void compute(const Context& context) const {
    Tensor spikes = context.input(0);
    const uint8_t *x = (uint8_t*)spikes.data, *mask = (uint8_t*)context.input(1).data;
    const int64_t batch = spikes.sizes[1], length = spikes.sizes[2], width = spikes.sizes[4], size = width / heads;
    const int64_t tasks = spikes.sizes[0] * batch;
    spikes.sizes.erase(spikes.sizes.begin() + 3);
    float* out = (float*)context.output(spikes.sizes);
    context.parallel(tasks, [&](int64_t task) {
      thread_local std::vector<float> products, value;  // [H, d, d], [D]
      thread_local std::vector<int32_t> fired;
      products.assign(width * size, 0);
      value.resize(width);
      for (int64_t l = 0; l < length; ++l) {
        const uint8_t* token = x + (task * length + l) * 3 * width;
        if (mask && !mask[task % batch * length + l]) continue;
        std::copy_n(token + 2 * width, width, value.data());
        find(token + width, width, 1, fired);
        for (int32_t i = 1; i <= fired[0]; ++i)
          add(value.data() + fired[i] / size * size, products.data() + fired[i] * size, size);
      }
      for (int64_t l = 0; l < length; ++l) {
        float* row = out + (task * length + l) * width;
        std::fill_n(row, width, 0);
        if (mask && !mask[task % batch * length + l]) continue;
        find(x + (task * length + l) * 3 * width, width, 1, fired);
        for (int32_t i = 1; i <= fired[0]; ++i)
          add(products.data() + fired[i] * size, row + fired[i] / size * size, size);
      }
    });
  }

  static void add(const float* __restrict from, float* __restrict to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  }
};

// What ONNX Runtime asks of an operator (`OrtCustomOp`, version 16).
template <class Kernel>
struct Operator {
  using Self = const Operator*;
  uint32_t version = 16;
  void* (*create)(Self, Api, const void*) = [](Self, Api api, const void* info) -> void* {
    return new std::pair<Api, Kernel>(std::piecewise_construct, std::make_tuple(api), std::make_tuple(api, info));
  };
  const char* (*name)(Self) = [](Self) { return Kernel::NAME; };
  const char* (*provider)(Self) = [](Self) -> const char* { return nullptr; };  // the CPU
  int (*input_type)(Self, size_t) = [](Self, size_t i) { return Kernel::INPUTS[i]; };
  size_t (*num_inputs)(Self) = [](Self) { return std::size(Kernel::INPUTS); };
  int (*output_type)(Self, size_t) = [](Self, size_t) { return Kernel::OUTPUT_TYPE; };
  size_t (*num_outputs)(Self) = [](Self) -> size_t { return 1; };
  void (*compute)(void*, void*) = [](void* kernel, void* context) {
    auto& [api, self] = *static_cast<std::pair<Api, Kernel>*>(kernel);
    self.compute({api, context});
  };
  void (*destroy)(void*) = [](void* kernel) { delete static_cast<std::pair<Api, Kernel>*>(kernel); };
  int (*input_is_optional)(Self, size_t) = [](Self, size_t i) { return int(i >= Kernel::NEEDED); };
  int (*output_is_optional)(Self, size_t) = [](Self, size_t) { return 0; };
  int (*memory)(Self, size_t) = [](Self, size_t) { return 0; };
  void* (*others[16])() = {};  // that it can do without
};

extern "C" void* RegisterCustomOps(void* options, void* const* base) {
  const Api api = reinterpret_cast<Api (*)(uint32_t)>(base[0])(17);
  static const Operator<SpikeLinear> linear;
  static const Operator<SpikeNeuron> neuron;
  static const Operator<SpikeNeurons> neurons;
  static const Operator<SpikeAttention> attention;
  static void* domain = [&] {
    void* made;
    call(api, CREATE_DOMAIN, "modeling_spikebert", &made);
    for (const void* one : {(const void*)&linear, (const void*)&neuron, (const void*)&neurons, (const void*)&attention})
      call(api, ADD_OPERATOR, made, one);
    return made;
  }();
  return call(api, ADD_DOMAIN, options, domain);
}
