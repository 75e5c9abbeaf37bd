// The small operations of a decoder layer on CPU, each one pass over memory: residual and norm, rotation and cache write,
// attention of one-token spans over the paged cache, gated activation; and, for processors that multiply bfloat16 in vectors,
// matrix products. Beside them, reads of many short runs of a file. `native.py` builds and calls this file; what it computes is what
// the eager operations beside each call compute. Everything inside is float32.

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 16;
typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct bfloat16 { uint16_t bits; };

inline Lanes load(const float* from) { Lanes x; memcpy(&x, from, sizeof x); return x; }
inline void store(float* to, Lanes x) { memcpy(to, &x, sizeof x); }

inline Lanes load(const bfloat16* from) {
    Halves half;
    memcpy(&half, from, sizeof half);
#ifdef __AVX512F__  // some compilers make three instructions of the general form
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    return (Lanes)(__builtin_convertvector(half, Words) << 16);
#endif
}

inline void store(bfloat16* to, Lanes x) {  // to nearest, ties to even
    Words bits = (Words)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#ifdef __AVX512F__
    Halves half = (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    Halves half = __builtin_convertvector(bits, Halves);
#endif
    memcpy(to, &half, sizeof half);
}

// The last, shorter part of a row; missing lanes are zero.
template <class T> inline Lanes load(const T* from, int64_t count) {
    if (count >= WIDTH) return load(from);
    T part[WIDTH] = {};
    memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <class T> inline void store(T* to, Lanes x, int64_t count) {
    if (count >= WIDTH) return store(to, x);
    T part[WIDTH];
    store(part, x);
    memcpy(to, part, count * sizeof(T));
}

inline Lanes all(float x) { return x - (Lanes){}; }

inline float sum(Lanes x) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

inline float largest(Lanes x) {
    float most = x[0];
    for (int i = 1; i < WIDTH; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x to about 2 units in the last place; below -87 the smallest normal number.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    Lanes shifted = x * 1.44269504f + shift, n = shifted - shift;
    Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r + 1.0f) * r + 1.0f;
    return (Lanes)((Ints)p + ((Ints)shifted << 23));
}

#ifdef __AVX512F__
// One level of the tree below: 2 * `half` vectors to `half`, each of two neighbours' partial sums.
template <int half> inline void fold(Lanes* x) {
    Ints low, high;
    for (int i = 0; i < WIDTH; i++) {
        int part = i / half, lane = i % half;  // of two sources in turn, `half` lanes at a time
        low[i] = (part & 1) * WIDTH + (part / 2) * 2 * half + lane;
        high[i] = low[i] + half;
    }
    for (int i = 0; i < half; i++) x[i] = __builtin_shuffle(x[i], x[i + half], low) + __builtin_shuffle(x[i], x[i + half], high);
}
#endif

// The sums of 16 vectors, as the lanes of one.
inline Lanes sums(Lanes* x) {
#ifdef __AVX512F__
    fold<8>(x), fold<4>(x), fold<2>(x), fold<1>(x);
    return x[0];
#else
    Lanes result;
    for (int i = 0; i < WIDTH; i++) result[i] = sum(x[i]);
    return result;
#endif
}

template <class T>
void add_rms_norm(T* x, const T* delta, const T* weight, T* out, int64_t rows, int64_t size, float eps, float offset) {
#pragma omp parallel for if (rows * size > 32768)
    for (int64_t row = 0; row < rows; row++) {
        T* xs = x + row * size;
        const T* deltas = delta + row * size;
        Lanes squares = {};
        for (int64_t i = 0; i < size; i += WIDTH) {
            Lanes value = load(xs + i, size - i);
            if (delta) {
                store(xs + i, value + load(deltas + i, size - i), size - i);
                value = load(xs + i, size - i);
            }
            squares += value * value;
        }
        float factor = 1.0f / __builtin_sqrtf(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += WIDTH)
            store(out + row * size + i, load(xs + i, size - i) * factor * (load(weight + i, size - i) + offset), size - i);
    }
}

// One head of a token: normalized where there is a weight, rotated, written to `to`.
template <class T>
void place_head(const T* from, T* to, const T* weight, const T* cos, const T* sin, int64_t head_dim, int64_t rotated, float eps,
                float offset) {
    float x[head_dim];
    float squares = 0;
    for (int64_t i = 0; i < head_dim; i += WIDTH) {
        Lanes value = load(from + i, head_dim - i);
        squares += sum(value * value);
        store(x + i, value, head_dim - i);
    }
    if (weight) {
        float factor = 1.0f / __builtin_sqrtf(squares / head_dim + eps);
        for (int64_t i = 0; i < head_dim; i += WIDTH) {
            T rounded[WIDTH];  // as a norm's output is, before the rotation
            store(rounded, load(x + i, head_dim - i) * factor * (load(weight + i, head_dim - i) + offset));
            store(x + i, load(rounded), head_dim - i);
        }
    }
    int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i += WIDTH) {
        int64_t n = half - i;
        Lanes low = load(x + i, n), high = load(x + half + i, n);
        store(to + i, low * load(cos + i, n) + high * load(sin + i, n), n);
        store(to + half + i, high * load(cos + half + i, n) + low * load(sin + half + i, n), n);
    }
    for (int64_t i = rotated; i < head_dim; i += WIDTH) store(to + i, load(x + i, head_dim - i), head_dim - i);
}

template <class T>
void rotate_and_cache(T* qkv, const T* cos, const T* sin, const T* q_weight, const T* k_weight, float eps, float offset,
                      const int64_t* slots, T* keys, T* values, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotated,
                      int64_t block_size) {
#pragma omp parallel for if (tokens * (heads + kv_heads) * head_dim > 16384)
    for (int64_t token = 0; token < tokens; token++) {
        T* head = qkv + token * (heads + 2 * kv_heads) * head_dim;
        const T *c = cos + token * rotated, *s = sin + token * rotated;
        int64_t row = slots[token] / block_size * kv_heads * block_size + slots[token] % block_size;
        for (int64_t h = 0; h < heads; h++, head += head_dim) place_head(head, head, q_weight, c, s, head_dim, rotated, eps, offset);
        for (int64_t h = 0; h < kv_heads; h++, head += head_dim)
            place_head(head, keys + (row + h * block_size) * head_dim, k_weight, c, s, head_dim, rotated, eps, offset);
        for (int64_t h = 0; h < kv_heads; h++, head += head_dim)
            memcpy(values + (row + h * block_size) * head_dim, head, head_dim * sizeof(T));
    }
}

// `size` numbers as float32, the last vector filled up with zeros.
template <class T> inline void widen(const T* from, Lanes* to, int64_t size) {
    for (; size >= WIDTH; size -= WIDTH, from += WIDTH) *to++ = load(from);
    if (size) *to = load(from, size);
}

// What a thread works with, in float32; `lanes` vectors a head.
struct Scratch {
    Lanes *queries, *mixed, *tile, *scores;  // [group, lanes], [group, lanes], [WIDTH, lanes], [group, tiles]

    Scratch(int64_t group, int64_t lanes, int64_t tiles) {
        queries = (Lanes*)aligned_alloc(sizeof(Lanes), ((2 * group + WIDTH) * lanes + group * tiles) * sizeof(Lanes));
        mixed = queries + group * lanes, tile = mixed + group * lanes, scores = tile + WIDTH * lanes;
    }
    ~Scratch() { free(queries); }
};

// Where the tokens that a query sees lie in a pool.
struct Places {
    const int32_t* table;
    int64_t first, context, block_size, block_stride, head_dim;

    // Bring 16 tokens from `first` + `start` on into the tile; beyond the end, the last token again. Memory is asked early
    // for what is read `ahead` blocks later: of this pool or, beyond its last block, of `next_pool`, from `next` on.
    template <class T>
    void read(const T* pool, int64_t start, Lanes* tile, int64_t lanes, const T* next_pool, const Places& next) const {
        int64_t token = first + start, block = token / block_size, slot = token % block_size, last = (context - 1) / block_size;
        int64_t ahead = block_size < 32 ? 32 / block_size : 1, next_first = next.first / block_size, bytes = head_dim * sizeof(T);
        for (int row = 0; row < WIDTH; row++) {
            int64_t later = block + ahead, beyond = next_first + later - last - 1;
            const T* early = later <= last ? pool + table[later] * block_stride : next_pool + next.table[beyond] * block_stride;
            if (later <= last || beyond * block_size < next.context)
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)(early + slot * head_dim) + i);
            widen(pool + table[block] * block_stride + slot * head_dim, tile + row * lanes, head_dim);
            if (token + 1 == context) continue;
            token++;
            if (++slot == block_size) slot = 0, block++;
        }
    }
};

// Add to `mixed`, `count` vectors of it, those of the tile's rows, weighted.
template <int count> inline void mix(Lanes* mixed, const Lanes* tile, int64_t lanes, const float* weights) {
    Lanes part[count];
    for (int i = 0; i < count; i++) part[i] = mixed[i];
    for (int row = 0; row < WIDTH; row++)
        for (int i = 0; i < count; i++) part[i] += tile[row * lanes + i] * weights[row];
    for (int i = 0; i < count; i++) mixed[i] = part[i];
}

// The query heads of one KV head over one sequence, 16 tokens at a time: scores, softmax, mixture of the values.
template <class T>
void attend(const T* q, T* out, const T* keys, const T* values, const Places& places, const T* next_keys, const Places& next,
            int64_t group, float scale, float softcap, Scratch& s) {
    int64_t head_dim = places.head_dim, lanes = (head_dim + WIDTH - 1) / WIDTH;
    int64_t length = places.context - places.first, tiles = (length + WIDTH - 1) / WIDTH;
    for (int64_t g = 0; g < group; g++) widen(q + g * head_dim, s.queries + g * lanes, head_dim);
    for (int64_t i = 0; i < group * lanes; i++) s.queries[i] *= scale, s.mixed[i] = Lanes{};
    for (int64_t tile = 0; tile < tiles; tile++) {
        places.read(keys, tile * WIDTH, s.tile, lanes, values, places);
        for (int64_t g = 0; g < group; g++) {
            Lanes products[WIDTH] = {};
            for (int64_t i = 0; i < lanes; i++)
                for (int row = 0; row < WIDTH; row++) products[row] += s.queries[g * lanes + i] * s.tile[row * lanes + i];
            Lanes scores = sums(products);
            if (softcap) scores = softcap - 2.0f * softcap / (exponential(scores * (2.0f / softcap)) + 1.0f);  // softcap * tanh
            s.scores[g * tiles + tile] = scores;
        }
    }
    float totals[group];
    for (int64_t g = 0; g < group; g++) {
        Lanes *scores = s.scores + g * tiles, most = scores[0], total = {};
        for (int64_t row = length - (tiles - 1) * WIDTH; row < WIDTH; row++) scores[tiles - 1][row] = -INFINITY;
        for (int64_t tile = 0; tile < tiles; tile++) most = scores[tile] > most ? scores[tile] : most;
        float top = largest(most);
        for (int64_t tile = 0; tile < tiles; tile++) total += scores[tile] = exponential(scores[tile] - top);
        totals[g] = sum(total);
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
        places.read(values, tile * WIDTH, s.tile, lanes, next_keys, next);
        for (int64_t g = 0; g < group; g++) {
            const float* weights = (const float*)&s.scores[g * tiles + tile];
            int64_t i = 0;
            for (; i + 4 <= lanes; i += 4) mix<4>(s.mixed + g * lanes + i, s.tile + i, lanes, weights);
            for (; i < lanes; i++) mix<1>(s.mixed + g * lanes + i, s.tile + i, lanes, weights);
        }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < lanes; i++)
            store(out + g * head_dim + i * WIDTH, s.mixed[g * lanes + i] / totals[g], head_dim - i * WIDTH);
}

template <class T>
void paged_attention(const T* q, T* out, const T* keys, const T* values, const int64_t* rows, const int32_t* tables, const int64_t* contexts,
                     const int32_t* groups, int64_t spans, int64_t kv_heads, int64_t head_dim, int64_t q_stride, int64_t out_stride,
                     int64_t block_size, int64_t table_width, int64_t window, float scale, float softcap) {
    int64_t most_heads = 0, longest = 0;
    for (int64_t h = 0; h < kv_heads; h++) most_heads = groups[h + 1] - groups[h] > most_heads ? groups[h + 1] - groups[h] : most_heads;
    for (int64_t span = 0; span < spans; span++) longest = contexts[span] > longest ? contexts[span] : longest;
    if (window && longest > window) longest = window;
    int64_t head_stride = block_size * head_dim;
    auto places = [=](int64_t span) {
        int64_t context = contexts[span], first = window && context > window ? context - window : 0;
        return Places{tables + span * table_width, first, context, block_size, kv_heads * head_stride, head_dim};
    };
#pragma omp parallel
    {
        Scratch scratch(most_heads, (head_dim + WIDTH - 1) / WIDTH, (longest + WIDTH - 1) / WIDTH);
#pragma omp for schedule(dynamic, spans > 8 ? kv_heads : 1)
        for (int64_t item = 0; item < spans * kv_heads; item++) {
            int64_t span = item / kv_heads, h = item % kv_heads;
            int64_t other = item + 1 < spans * kv_heads ? (item + 1) / kv_heads : span, other_h = (item + 1) % kv_heads;
            attend(q + rows[span] * q_stride + groups[h] * head_dim, out + rows[span] * out_stride + groups[h] * head_dim,
                   keys + h * head_stride, values + h * head_stride, places(span), keys + other_h * head_stride, places(other),
                   groups[h + 1] - groups[h], scale, softcap, scratch);
        }
    }
}

template <class T> void silu_and_multiply(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += WIDTH) {
            Lanes x = load(gate + i, size - i);
            store(out + row * size + i, x / (1.0f + exponential(-x)) * load(up + i, size - i), size - i);
        }
    }
}

// Processors with matrix units (AMX) leave the product to oneDNN, which uses them.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define MULTIPLIES 1

// A packed matrix: panels of 32 outputs, in each the inputs two by two, [panels, pairs, PANEL] pairs of bfloat16.
constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t TILE = 12;          // rows whose sums fill the registers
constexpr int64_t ROWS = 12 * TILE;   // rows whose inputs stay in the cache while the panels pass by
constexpr int64_t AHEAD = 64 * PANEL;  // how early memory is asked for a panel's next pairs

// Elements 2 * pair and 2 * pair + 1 of a row; zero beyond its end.
inline uint32_t pair_of(const bfloat16* row, int64_t pair, int64_t size) {
    if (2 * pair + 1 == size) return row[2 * pair].bits;
    uint32_t both;
    memcpy(&both, row + 2 * pair, sizeof both);
    return both;
}

void pack_matrix(const bfloat16* weight, uint32_t* packed, int64_t outputs, int64_t inputs) {
    int64_t pairs = (inputs + 1) / 2, panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t column = 0; column < PANEL; column++) {
            int64_t output = panel * PANEL + column;
            for (int64_t pair = 0; pair < pairs; pair++)
                packed[(panel * pairs + pair) * PANEL + column] = output < outputs ? pair_of(weight + output * inputs, pair, inputs) : 0;
        }
}

// `rows` rows of x, stored pair by pair with `stride` rows between, times one panel.
template <int rows>
void multiply_tile(const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t pairs, const float* bias, bfloat16* y, int64_t y_stride,
                   int64_t columns) {
    Lanes sums[rows][2];
    for (int row = 0; row < rows; row++) sums[row][0] = load(bias), sums[row][1] = load(bias + WIDTH);
    for (int64_t pair = 0; pair < pairs; pair++, panel += PANEL, x += stride) {
        __builtin_prefetch(panel + AHEAD);
        __builtin_prefetch(panel + AHEAD + WIDTH);
        __m512bh left = (__m512bh)_mm512_loadu_si512(panel), right = (__m512bh)_mm512_loadu_si512(panel + WIDTH);
        for (int row = 0; row < rows; row++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(x[row]);
            sums[row][0] = (Lanes)_mm512_dpbf16_ps((__m512)sums[row][0], left, both);
            sums[row][1] = (Lanes)_mm512_dpbf16_ps((__m512)sums[row][1], right, both);
        }
    }
    for (int row = 0; row < rows; row++) {
        store(y + row * y_stride, sums[row][0], columns);
        if (columns > WIDTH) store(y + row * y_stride + WIDTH, sums[row][1], columns - WIDTH);
    }
}

typedef void (*Tile)(const uint32_t*, int64_t, const uint32_t*, int64_t, const float*, bfloat16*, int64_t, int64_t);
const Tile TILES[TILE] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
                          multiply_tile<7>, multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

void multiply(const bfloat16* x, const uint32_t* packed, const bfloat16* bias, bfloat16* y, uint32_t* scratch, int64_t rows,
              int64_t outputs, int64_t inputs) {
    int64_t pairs = (inputs + 1) / 2, panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel
    for (int64_t first = 0; first < rows; first += ROWS) {
        int64_t count = rows - first < ROWS ? rows - first : ROWS, tiles = (count + TILE - 1) / TILE;
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t row = 0; row < count; row++) scratch[pair * count + row] = pair_of(x + (first + row) * inputs, pair, inputs);
#pragma omp for
        for (int64_t panel = 0; panel < panels; panel++) {
            int64_t columns = outputs - panel * PANEL < PANEL ? outputs - panel * PANEL : PANEL;
            float added[PANEL] = {};
            for (int64_t column = 0; bias && column < columns; column++) {
                uint32_t bits = (uint32_t)bias[panel * PANEL + column].bits << 16;
                memcpy(added + column, &bits, sizeof bits);
            }
            for (int64_t tile = 0, row = 0; tile < tiles; tile++) {  // tiles as equal as they go
                int64_t part = (count - row + tiles - tile - 1) / (tiles - tile);
                TILES[part - 1](scratch + row, count, packed + panel * pairs * PANEL, pairs, added,
                                y + (first + row) * outputs + panel * PANEL, outputs, columns);
                row += part;
            }
        }
    }
}
#endif

}  // namespace

#ifdef MULTIPLIES
extern "C" void pack_matrix_bfloat16(const bfloat16* weight, uint32_t* packed, int64_t outputs, int64_t inputs) {
    pack_matrix(weight, packed, outputs, inputs);
}
extern "C" void multiply_bfloat16(const bfloat16* x, const uint32_t* packed, const bfloat16* bias, bfloat16* y, uint32_t* scratch,
                                  int64_t rows, int64_t outputs, int64_t inputs) {
    multiply(x, packed, bias, y, scratch, rows, outputs, inputs);
}
#endif

// `runs` runs of `length` bytes, one every `stride` bytes of the file, one after another into memory. The bytes read: all of them,
// fewer where the file ends, or less than 0 when reading failed.
extern "C" int64_t read_runs(int64_t file, char* to, int64_t offset, int64_t length, int64_t stride, int64_t runs) {
    int64_t total = 0;
    for (int64_t run = 0; run < runs; run++)
        for (int64_t done = 0; done < length;) {
            ssize_t count = pread(file, to + total, length - done, offset + run * stride + done);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) return -errno;
            if (count == 0) return total;
            done += count, total += count;
        }
    return total;
}

#define EXPORT(T)                                                                                                                        \
    extern "C" void add_rms_norm_##T(T* x, const T* delta, const T* weight, T* out, int64_t rows, int64_t size, float eps,               \
                                     float offset) {                                                                                     \
        add_rms_norm(x, delta, weight, out, rows, size, eps, offset);                                                                    \
    }                                                                                                                                    \
    extern "C" void rotate_and_cache_##T(T* qkv, const T* cos, const T* sin, const T* q_weight, const T* k_weight, float eps,            \
                                         float offset, const int64_t* slots, T* keys, T* values, int64_t tokens, int64_t heads,          \
                                         int64_t kv_heads, int64_t head_dim, int64_t rotated, int64_t block_size) {                      \
        rotate_and_cache(qkv, cos, sin, q_weight, k_weight, eps, offset, slots, keys, values, tokens, heads, kv_heads, head_dim,         \
                         rotated, block_size);                                                                                           \
    }                                                                                                                                    \
    extern "C" void paged_attention_##T(const T* q, T* out, const T* keys, const T* values, const int64_t* rows, const int32_t* tables,  \
                                        const int64_t* contexts, const int32_t* groups, int64_t spans, int64_t kv_heads,                 \
                                        int64_t head_dim, int64_t q_stride, int64_t out_stride, int64_t block_size,                      \
                                        int64_t table_width, int64_t window, float scale, float softcap) {                               \
        paged_attention(q, out, keys, values, rows, tables, contexts, groups, spans, kv_heads, head_dim, q_stride, out_stride,           \
                        block_size, table_width, window, scale, softcap);                                                                \
    }                                                                                                                                    \
    extern "C" void silu_and_multiply_##T(const T* gate_up, T* out, int64_t rows, int64_t size) {                                        \
        silu_and_multiply(gate_up, out, rows, size);                                                                                     \
    }

EXPORT(float)
EXPORT(bfloat16)
