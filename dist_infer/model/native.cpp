// The small operations of a decoder layer on CPU, each one pass over memory: residual and norm, rotation and cache write, attention over the
// paged cache, gated activation; and, for processors that multiply bfloat16 in vectors, matrix products, and layers as a whole made of all
// these. Beside them, noise, histograms and greatest tokens for sampling, and reads of many short runs of a file. `native.py` builds and
// calls this file; what it computes is what the eager operations beside each call compute. Everything inside is float32.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <unistd.h>
#include <utility>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 16;
typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int64_t Longs __attribute__((vector_size(8 * WIDTH)));
typedef double Doubles __attribute__((vector_size(8 * WIDTH)));

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
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
    Words bits = (Words)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#ifdef __AVX512F__
    Halves half = (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    Halves half = __builtin_convertvector(bits, Halves);
#endif
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
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < WIDTH; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

// The greater, or lesser, of each number and a bound; NaN stays. (Compilers make two instructions of a choice.)
inline Lanes at_least(Lanes x, float bound) {
#ifdef __AVX512F__
    return (Lanes)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#else
    return x < bound ? all(bound) : x;
#endif
}
inline Lanes at_most(Lanes x, float bound) {
#ifdef __AVX512F__
    return (Lanes)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#else
    return x > bound ? all(bound) : x;
#endif
}

inline Lanes floor_of(Lanes x) {
#ifdef __AVX512F__
    return (Lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    for (int i = 0; i < WIDTH; i++) x[i] = __builtin_floorf(x[i]);
    return x;
#endif
}

// e^x to about 2 units in the last place; below -87 the smallest normal number.
inline Lanes exponential(Lanes x) {
    x = at_most(at_least(x, -87.0f), 88.0f);
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

template <class T>
void add_rms_norm(T* x, const T* delta, const T* weight, T* out, int64_t rows, int64_t size, float eps, float offset) {
#pragma omp parallel for if (rows * size > 16384)
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
    Lanes squares = {};
    for (int64_t i = 0; i < head_dim; i += WIDTH) {
        Lanes value = load(from + i, head_dim - i);
        squares += value * value;
        store(x + i, value, head_dim - i);
    }
    if (weight) {
        float factor = 1.0f / __builtin_sqrtf(sum(squares) / head_dim + eps);
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

// The natural logarithm of normal numbers above 0, to about 2 units in the last place.
inline Lanes logarithm(Lanes x) {
    Ints bits = (Ints)x, exponent = ((bits - 0x3f3504f3) >> 23);  // of a mantissa from sqrt(1/2) to sqrt(2)
    Lanes m = (Lanes)(bits - (exponent << 23)) - 1.0f, e = __builtin_convertvector(exponent, Lanes);
    Lanes p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    Lanes square = m * m;
    return (p * m * square + e * -2.12194440e-4f - 0.5f * square) + m + e * 0.693359375f;
}

inline Lanes silu(Lanes x) { return x / (1.0f + exponential(-x)); }

// A row of 16 by 16 numbers of 32 bits becomes a column.
inline void transpose(Ints* x) {
#ifdef __AVX512F__
    __m512i a[WIDTH], b[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            a[i + 8 * j] = _mm512_shuffle_i32x4(b[i + 8 * j], b[i + 8 * j + 4], 0x88);
            a[i + 8 * j + 4] = _mm512_shuffle_i32x4(b[i + 8 * j], b[i + 8 * j + 4], 0xdd);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[i + 4 * j] = (Ints)_mm512_shuffle_i32x4(a[i + 4 * j], a[i + 4 * j + 8], 0x88);
            x[i + 4 * j + 8] = (Ints)_mm512_shuffle_i32x4(a[i + 4 * j], a[i + 4 * j + 8], 0xdd);
        }
#else
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < i; j++) {
            int32_t other = x[i][j];
            x[i][j] = x[j][i], x[j][i] = other;
        }
#endif
}

// What products are made of: a *unit* is one float32, or two neighbouring bfloat16 where the processor multiplies those.
template <class T> struct Units {
    typedef float Unit;
    static constexpr int64_t SIZE = 1;  // numbers in a unit
};
template <class T> inline Lanes units_of(const T* from, int64_t count, float) { return load(from, count); }
inline Lanes repeated(float x) { return all(x); }
// Vectors of units, each of SIZE rows' numbers: as many as those numbers fill.
template <class T> inline void beside(const T* row, int64_t, Lanes* to, float) { to[0] = load(row); }
inline Lanes add_products(Lanes sum, const float* units, float x) { return sum + load(units) * x; }
inline Lanes add_products(Lanes sum, Lanes a, Lanes b, float) { return sum + a * b; }

// 16 bytes, four times.
inline Lanes repeated(const void* from) {
#ifdef __AVX512F__
    return (Lanes)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
#else
    Lanes x;
    for (int i = 0; i < 4; i++) memcpy((char*)&x + 16 * i, from, 16);
    return x;
#endif
}
inline Lanes four_units(const float* from, float) { return repeated(from); }
inline Lanes four_units(const bfloat16* from, float) {
    uint32_t four[4];
    for (int i = 0; i < 4; i++) four[i] = (uint32_t)from[i].bits << 16;
    return repeated(four);
}

#ifdef __AVX512BF16__
template <> struct Units<bfloat16> {
    typedef uint32_t Unit;
    static constexpr int64_t SIZE = 2;
};
inline Lanes units_of(const bfloat16* from, int64_t count, uint32_t) {
    if (count >= 2 * WIDTH) return load((const float*)from);
    bfloat16 part[2 * WIDTH] = {};
    memcpy(part, from, count * sizeof(bfloat16));
    return load((const float*)part);
}
inline Lanes repeated(uint32_t x) { return (Lanes)_mm512_set1_epi32(x); }
inline void beside(const bfloat16* row, int64_t stride, Lanes* to, uint32_t) {
    // Numbers of the first row, and of the second, by turns: from the first half of both, and from the other half.
    const __m512i turns = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i others = _mm512_add_epi16(turns, _mm512_set1_epi16(WIDTH));
    __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + stride);
    to[0] = (Lanes)_mm512_permutex2var_epi16(a, turns, b), to[1] = (Lanes)_mm512_permutex2var_epi16(a, others, b);
}
inline Lanes add_products(Lanes sum, const uint32_t* units, uint32_t x) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(units), (__m512bh)_mm512_set1_epi32(x));
}
inline Lanes add_products(Lanes sum, Lanes a, Lanes b, uint32_t) { return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
inline Lanes four_units(const bfloat16* from, uint32_t) { return repeated(from); }
#endif

inline void store_units(float* to, Lanes x) { store(to, x); }
#ifdef __AVX512BF16__
inline void store_units(uint32_t* to, Lanes x) { store((bfloat16*)to, x); }
#endif

// Of four vectors, each of four rows' four parts, the sums of the parts: row by row, a number of each vector.
inline Lanes add_parts(Lanes a, Lanes b, Lanes c, Lanes d) {
#ifdef __AVX512F__
    __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
    __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d);
    __m512 low = (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    return (Lanes)(low + high);
#else
    const Lanes from[4] = {a, b, c, d};
    Lanes sums;
    for (int row = 0; row < 4; row++)
        for (int i = 0; i < 4; i++) {
            const Lanes& x = from[i];
            sums[4 * row + i] = (x[4 * row] + x[4 * row + 2]) + (x[4 * row + 1] + x[4 * row + 3]);
        }
    return sums;
#endif
}

// Four vectors, each of four numbers of four rows, become the rows.
inline void transpose_fours(const Lanes* x, Lanes* rows, int64_t stride) {
#ifdef __AVX512F__
    __m512 ab[2] = {_mm512_shuffle_f32x4((__m512)x[0], (__m512)x[1], 0x44), _mm512_shuffle_f32x4((__m512)x[0], (__m512)x[1], 0xee)};
    __m512 cd[2] = {_mm512_shuffle_f32x4((__m512)x[2], (__m512)x[3], 0x44), _mm512_shuffle_f32x4((__m512)x[2], (__m512)x[3], 0xee)};
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        rows[2 * half * stride] = (Lanes)_mm512_shuffle_f32x4(ab[half], cd[half], 0x88);
        rows[(2 * half + 1) * stride] = (Lanes)_mm512_shuffle_f32x4(ab[half], cd[half], 0xdd);
    }
#else
    for (int row = 0; row < 4; row++)
        for (int i = 0; i < WIDTH; i++) rows[row * stride][i] = x[i / 4][4 * row + i % 4];
#endif
}

constexpr int64_t TILES = 4;             // tiles of 16 keys looked at together
constexpr int64_t KEYS = TILES * WIDTH;  // they begin at multiples of their number, so a row's sums do not depend on the rows beside it
constexpr int64_t TOGETHER = 4;          // rows whose parts fill a vector; so many, or twice as many, fill the registers with their sums
constexpr int64_t RUN = 8;               // keys that lie one after another
constexpr int64_t MOST_ROWS = 64;        // queries times heads that share what is read of the cache
constexpr float NOTHING = -1e30f;        // less than any score

// Vectors that hold the sums of a head.
template <class T> constexpr int64_t lanes_of(int64_t head_dim) {
    constexpr int64_t size = Units<T>::SIZE;
    return (head_dim + WIDTH * size - 1) / (WIDTH * size) * size;
}

// Keys or values that are looked at together: where each run of them is, and how far one is from the next; null where there are none.
template <class T> struct Runs {
    const T* at[KEYS / RUN];
    int64_t stride[KEYS / RUN];
};

// What a thread works with; `lanes` vectors a head.
template <class T> struct Scratch {
    typedef typename Units<T>::Unit Unit;
    Lanes *mixed, *totals;         // [rows, lanes], [rows]
    Unit *queries, *weights;       // [fours of rows, quads, 4, 4], [rows, KEYS in units]
    T *key_copies, *value_copies;  // [KEYS, dims]
    float* greatest;               // [rows]
    Runs<T> keys, values;

    // `fours` of rows: each KV head has its own.
    Scratch(int64_t rows, int64_t fours, int64_t lanes) {
        mixed = (Lanes*)aligned_alloc(sizeof(Lanes), (rows * (lanes + TILES + 2) + (fours * TOGETHER + 2 * KEYS) * lanes) * sizeof(Lanes));
        totals = mixed + rows * lanes, queries = (Unit*)(totals + rows), weights = queries + fours * TOGETHER * lanes * WIDTH;
        key_copies = (T*)(weights + rows * KEYS), value_copies = key_copies + KEYS * lanes * WIDTH;
        greatest = (float*)(value_copies + KEYS * lanes * WIDTH);
    }
    ~Scratch() { free(mixed); }
};

// Where the tokens of a head lie that are looked at together, run by run; a run that is not there is that of another token.
template <class T> struct Ahead {
    const T *keys[KEYS / RUN], *values[KEYS / RUN];

    Ahead(const T* pool_of_keys, const T* pool_of_values, const int64_t* places) {
        for (int64_t run = 0; run < KEYS / RUN; run++) {
            int64_t place = places[run * RUN] < 0 ? places[0] : places[run * RUN];
            keys[run] = pool_of_keys + place, values[run] = pool_of_values + place;
        }
    }
};

// Ask memory early for the two lines of a run that are its `pair`th. A core waits for some 20 lines at a time and then for the first of them, so
// they are asked for bit by bit, between other work.
template <class T> inline void ask(const T* run, int64_t pair) {
    __builtin_prefetch((const char*)run + 128 * pair, 0, 2), __builtin_prefetch((const char*)run + 128 * pair + 64, 0, 2);
}

// A sequence in the cache.
template <class T> struct Held {
    const T *keys, *values;
    const int32_t* table;
    int64_t context, block_size, head_stride, block_stride, head_dim;

    // Where each of KEYS tokens of a head lies, from `first` on; -1 beyond the last.
    void places(int64_t head, int64_t first, int64_t* to) const {
        int64_t count = std::min(KEYS, context - first), i = 0;
        for (int64_t block = first / block_size, slot = first % block_size; i < count; block++, slot = 0) {
            int64_t at = table[block] * block_stride + head * head_stride + slot * head_dim, stop = std::min(count, i + block_size - slot);
            for (; i < stop; i++, at += head_dim) to[i] = at;
        }
        for (; i < KEYS; i++) to[i] = -1;
    }

    // Where runs of `from` are that lie at `places`, whose numbers are looked at `width` at a time: in copies, `room` numbers each and zeros where
    // there are none, unless all of a run lie in one block.
    void find(const T* from, const int64_t* places, int64_t tiles, int64_t width, int64_t room, T* copies, Runs<T>& runs) const {
        for (int64_t run = 0; run < tiles * WIDTH / RUN; run++, places += RUN, copies += RUN * room) {
            runs.at[run] = places[0] < 0 ? nullptr : from + places[0], runs.stride[run] = head_dim;
            if (places[0] < 0 || (places[RUN - 1] >= 0 && block_size % RUN == 0 && head_dim % width == 0)) continue;
            memset(copies, 0, RUN * room * sizeof(T));
            for (int64_t key = 0; key < RUN && places[key] >= 0; key++) memcpy(copies + key * room, from + places[key], head_dim * sizeof(T));
            runs.at[run] = copies, runs.stride[run] = room;
        }
    }
};

// Of a run of keys the scores of some fours of rows, four keys a vector: two of every four of rows, whose first are `scores_stride` apart, as the
// queries of one are `distance` from the next's.
template <int fours, class T>
__attribute__((always_inline)) inline void score(const typename Units<T>::Unit* queries, int64_t distance, const T* keys, int64_t stride,
                                                 int64_t quads, Lanes* scores, int64_t scores_stride, const T* soon) {
    typedef typename Units<T>::Unit Unit;
    constexpr int64_t size = Units<T>::SIZE;
    Lanes sums[fours][RUN] = {};
    const T *k0 = keys, *k1 = keys + stride, *k2 = keys + 2 * stride, *k3 = keys + 3 * stride;
    int64_t down = 4 * stride;
    for (int64_t quad = 0; quad < quads; quad++, queries += WIDTH, k0 += 4 * size, k1 += 4 * size, k2 += 4 * size, k3 += 4 * size) {
        ask(soon, quad);
        const T* const first[4] = {k0, k1, k2, k3};
#pragma GCC unroll 8
        for (int key = 0; key < RUN; key++) {
            Lanes units = four_units(first[key % 4] + key / 4 * down, Unit());
#pragma GCC unroll 2
            for (int four = 0; four < fours; four++)
                sums[four][key] = add_products(sums[four][key], load((const float*)queries + four * distance), units, Unit());
        }
    }
#pragma GCC unroll 2
    for (int four = 0; four < fours; four++)
        for (int i = 0; i < 2; i++) {
            const Lanes* of = sums[four] + 4 * i;
            scores[four * scores_stride + i] = add_parts(of[0], of[1], of[2], of[3]);
        }
}

// Add to `mixed` of rows the values of runs, by the rows' weights: `columns` vectors, from `lane` on.
template <int rows, int columns, class T>
void mix_values(int64_t row, int64_t runs, int64_t lane, int64_t lanes, const Scratch<T>& s, const Ahead<T>& ahead) {
    typedef typename Units<T>::Unit Unit;
    constexpr int64_t size = Units<T>::SIZE, keys = KEYS / size;
    constexpr int64_t pairs = columns * WIDTH * size * (int64_t)sizeof(T) / 128;  // of lines, that a unit of all columns takes
    const Unit* weights = s.weights + row * keys;
    Lanes* mixed = s.mixed + row * lanes + lane;
    Lanes sums[rows][columns];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int column = 0; column < columns; column++) sums[i][column] = mixed[i * lanes + column];
    for (int64_t run = 0; run < runs && s.values.at[run]; run++) {
        int64_t stride = s.values.stride[run];
        const T *from = s.values.at[run] + lane * WIDTH, *soon = ahead.values[run] + lane * WIDTH * RUN;  // each pass asks for its share
        for (int64_t unit = 0; unit < RUN / size; unit++, from += size * stride, weights++) {
            for (int64_t pair = 0; pair < pairs; pair++) ask(soon, unit * pairs + pair);
            Lanes values[columns];
#pragma GCC unroll 4
            for (int column = 0; column < columns; column += size) beside(from + column * WIDTH, stride, values + column, Unit());
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
                for (int column = 0; column < columns; column++)
                    sums[i][column] = add_products(sums[i][column], values[column], repeated(weights[i * keys]), Unit());
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int column = 0; column < columns; column++) mixed[i * lanes + column] = sums[i][column];
}

// Rows' scores become weights of the values, of which each sees from its `begins` to its `ends`; what was summed up before is brought to the scale
// of the greatest score so far.
template <int rows, class T>
void weigh(Lanes (*scores)[TILES], int64_t row, int64_t first, int64_t tiles, const int64_t* begins, const int64_t* ends, int64_t lanes, float scale,
           float softcap, Scratch<T>& s) {
    Lanes most[rows], totals[rows], greatest = {}, before = {};  // the latter two hold a number for each row
    Ints at;
    for (int i = 0; i < WIDTH; i++) at[i] = first + i;
    bool whole = true;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        most[i] = all(NOTHING), totals[i] = s.totals[row + i];
        whole &= first >= begins[i] && first + tiles * WIDTH <= ends[i];
    }
    for (int64_t tile = 0; tile < tiles; tile++, at += WIDTH) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            Lanes score = scores[i][tile] * scale;
            if (softcap) score = softcap - 2.0f * softcap / (exponential(score * (2.0f / softcap)) + 1.0f);  // softcap * tanh
            if (!whole) score = (at < (int32_t)begins[i] | at >= (int32_t)ends[i]) ? all(NOTHING) : score;
            most[i] = score > most[i] ? score : most[i], scores[i][tile] = score;
        }
    }
    bool greater = false;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        float top = largest(most[i]), was = s.greatest[row + i];
        greater |= top > was, most[i] = all(top > was ? top : was), s.greatest[row + i] = top > was ? top : was;
        greatest[i] = s.greatest[row + i], before[i] = was;
    }
    if (greater) {
        Lanes factors = exponential(before - greatest);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            for (int64_t lane = 0; lane < lanes; lane++) s.mixed[(row + i) * lanes + lane] *= factors[i];
            totals[i] *= factors[i];
        }
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            Lanes weight = exponential(scores[i][tile] - most[i]);
            if (!whole) weight = scores[i][tile] == NOTHING ? Lanes{} : weight;
            totals[i] += weight;
            store_units(s.weights + ((row + i) * KEYS + tile * WIDTH) / Units<T>::SIZE, weight);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) s.totals[row + i] = totals[i];
}

// Rows of one KV head, of which `queries` are: whole fours, or the last ones.
template <int rows, class T>
void attend_rows(const typename Units<T>::Unit* queries, int64_t row, int64_t first, int64_t tiles, int64_t quads, int64_t lanes,
                 const int64_t* begins, const int64_t* ends, float scale, float softcap, Scratch<T>& s, const Ahead<T>& ahead) {
    constexpr int fours = (rows + TOGETHER - 1) / TOGETHER;
    Lanes scores[fours * TOGETHER][TILES];
    for (int64_t tile = 0; tile < tiles; tile++) {
        Lanes found[fours][4] = {};
        for (int64_t half = 0; half < 2; half++) {
            int64_t run = 2 * tile + half;
            if (!s.keys.at[run]) break;
            score<fours, T>(queries, quads * WIDTH, s.keys.at[run], s.keys.stride[run], quads, found[0] + 2 * half, 4, ahead.keys[run]);
        }
        for (int four = 0; four < fours; four++) transpose_fours(found[four], &scores[four * TOGETHER][tile], TILES);
    }
    weigh<rows, T>(scores, row, first, tiles, begins + row, ends + row, lanes, scale, softcap, s);
    int64_t lane = 0, runs = tiles * WIDTH / RUN;
    for (; rows <= TOGETHER && lane + 4 <= lanes; lane += 4) mix_values<rows, 4>(row, runs, lane, lanes, s, ahead);
    for (; lane < lanes; lane += Units<T>::SIZE) mix_values<rows, Units<T>::SIZE>(row, runs, lane, lanes, s, ahead);
}

// A piece of work: tokens of a span, with the query heads of some KV heads.
struct Piece {
    int64_t span, token, count, position, head, last_head;  // `token` is its first row of the batch, `position` that token's

    int64_t begin(int64_t window) const { return window && position >= window ? position + 1 - window : 0; }  // the first key it sees
};

// What all pieces share.
template <class T> struct Job {
    const T* q;
    T* out;
    const int32_t* groups;
    int64_t q_stride, out_stride, head_dim, window;
    float scale, softcap;
};

// Blockwise, each row's greatest score kept up as its keys pass by (FlashAttention). `next` is read after this piece.
template <class T>
void attend(const Job<T>& job, const Piece& piece, const Held<T>& held, const Piece& next, const Held<T>& next_held, Scratch<T>& s) {
    const decltype(&attend_rows<1, T>) attend_some[] = {attend_rows<1, T>, attend_rows<2, T>, attend_rows<3, T>, attend_rows<4, T>,
                                                        attend_rows<2 * TOGETHER, T>};
    typedef typename Units<T>::Unit Unit;
    constexpr int64_t size = Units<T>::SIZE;
    int64_t head_dim = job.head_dim, lanes = lanes_of<T>(head_dim), units = (head_dim + size - 1) / size, quads = (units + 3) / 4;
    int64_t base = job.groups[piece.head], rows = piece.count * (job.groups[piece.last_head] - base), begins[rows], ends[rows];
    const T* from[rows];
    T* to[rows];
    int64_t row = 0;
    for (int64_t head = piece.head; head < piece.last_head; head++)
        for (int64_t token = 0; token < piece.count; token++)
            for (int64_t h = job.groups[head]; h < job.groups[head + 1]; h++, row++) {
                from[row] = job.q + (piece.token + token) * job.q_stride + h * head_dim;
                to[row] = job.out + (piece.token + token) * job.out_stride + h * head_dim;
                ends[row] = piece.position + token + 1;
                begins[row] = job.window && ends[row] > job.window ? ends[row] - job.window : 0;
            }
    Unit* four = s.queries;
    for (int64_t head = piece.head; head < piece.last_head; head++) {
        int64_t begin = (job.groups[head] - base) * piece.count, end = (job.groups[head + 1] - base) * piece.count;
        for (row = begin; row < end; row += TOGETHER, four += quads * WIDTH)
            for (int64_t i = 0; i < TOGETHER; i++)
                for (int64_t unit = 0; unit < units; unit += WIDTH) {
                    Lanes x = row + i < end ? units_of(from[row + i] + unit * size, head_dim - unit * size, Unit()) : Lanes{};
                    for (int64_t quad = unit / 4; quad < std::min(quads, unit / 4 + 4); quad++)
                        memcpy(four + quad * WIDTH + 4 * i, (Unit*)&x + 4 * quad - unit, 4 * sizeof(Unit));
                }
    }
    for (row = 0; row < rows; row++) {
        s.totals[row] = Lanes{}, s.greatest[row] = NOTHING;
        for (int64_t i = 0; i < lanes; i++) s.mixed[row * lanes + i] = Lanes{};
    }
    int64_t first = piece.begin(job.window) / KEYS * KEYS, stop = piece.position + piece.count, places[2][KEYS], turn = 0;
    held.places(piece.head, first, places[turn]);
    for (; first < stop; first += KEYS) {
        int64_t left = (stop - first + WIDTH - 1) / WIDTH, tiles = left < TILES ? left : TILES;
        four = s.queries;
        for (int64_t head = piece.head; head < piece.last_head; head++, turn ^= 1) {
            bool here = head + 1 < piece.last_head || first + KEYS < stop;
            if (head + 1 < piece.last_head) held.places(head + 1, first, places[turn ^ 1]);
            else if (here) held.places(piece.head, first + KEYS, places[turn ^ 1]);
            else next_held.places(next.head, next.begin(job.window) / KEYS * KEYS, places[turn ^ 1]);
            const Held<T>& later = here ? held : next_held;
            const Ahead<T> ahead(later.keys, later.values, places[turn ^ 1]);
            held.find(held.keys, places[turn], tiles, 4 * size, lanes * WIDTH, s.key_copies, s.keys);
            held.find(held.values, places[turn], tiles, WIDTH * size, lanes * WIDTH, s.value_copies, s.values);
            int64_t end = (job.groups[head + 1] - base) * piece.count;
            for (row = (job.groups[head] - base) * piece.count; row < end;) {
                int64_t left = end - row, count = left < 2 * TOGETHER ? std::min(left, TOGETHER) : 2 * TOGETHER;
                if (ends[row + count - 1] > first)  // else they see nothing here
                    attend_some[std::min(count, TOGETHER + 1) - 1](four, row, first, tiles, quads, lanes, begins, ends, job.scale, job.softcap, s,
                                                                   ahead);
                row += count, four += (count + TOGETHER - 1) / TOGETHER * quads * WIDTH;
            }
        }
    }
    for (row = 0; row < rows; row++) {
        float factor = 1.0f / sum(s.totals[row]);
        for (int64_t i = 0; i * WIDTH < head_dim; i++) store(to[row] + i * WIDTH, s.mixed[row * lanes + i] * factor, head_dim - i * WIDTH);
    }
}

template <class T>
void paged_attention(const T* q, T* out, const T* keys, const T* values, const int32_t* offsets, const int32_t* contexts, const int32_t* tables,
                     const int32_t* groups, int64_t spans, int64_t kv_heads, int64_t head_dim, int64_t q_stride, int64_t out_stride,
                     int64_t block_size, int64_t table_width, int64_t window, float scale, float softcap) {
    int64_t most_heads = 1, heads = groups[kv_heads], head_stride = block_size * head_dim;
    for (int64_t h = 0; h < kv_heads; h++) most_heads = groups[h + 1] - groups[h] > most_heads ? groups[h + 1] - groups[h] : most_heads;
    int64_t together = most_heads < MOST_ROWS ? MOST_ROWS / most_heads : 1;  // tokens
    std::vector<Piece> pieces;
    for (int64_t span = 0; span < spans; span++) {
        int64_t length = offsets[span + 1] - offsets[span];
        // Of many single tokens each is one piece: a block of all KV heads lies in one place. Of few, heads are shared out.
        int64_t step = length == 1 && spans > 3 && heads <= 2 * MOST_ROWS ? kv_heads : 1;
        for (int64_t token = 0; token < length; token += together)
            for (int64_t head = 0; head < kv_heads; head += step)
                pieces.push_back({span, offsets[span] + token, std::min(together, length - token), contexts[span] - length + token, head, head + step});
    }
    Job<T> job{q, out, groups, q_stride, out_stride, head_dim, window, scale, softcap};
    auto held = [&](const Piece& piece) {
        return Held<T>{keys, values, tables + piece.span * table_width, contexts[piece.span], block_size, head_stride, kv_heads * head_stride, head_dim};
    };
    int64_t count = pieces.size();
#pragma omp parallel
    {
        int64_t rows = std::max(together * most_heads, std::min(heads, 2 * MOST_ROWS));
        Scratch<T> scratch(rows, rows / TOGETHER + kv_heads, lanes_of<T>(head_dim));
#pragma omp for schedule(dynamic, spans > 3 ? 2 : 1)
        for (int64_t i = 0; i < count; i++) {
            const Piece& next = pieces[i + 1 < count ? i + 1 : i];
            attend(job, pieces[i], held(pieces[i]), next, held(next), scratch);
        }
    }
}

template <class T> void silu_and_multiply(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += WIDTH) {
            store(out + row * size + i, silu(load(gate + i, size - i)) * load(up + i, size - i), size - i);
        }
    }
}

// Noise as `noise.py` has it: ids are mixed, the keys of a row make a uniform number of each, and that makes standard Gumbel noise.
constexpr int64_t STEP = (int64_t)0x9E3779B97F4A7C15ull, MIX1 = (int64_t)0xBF58476D1CE4E5B9ull, MIX2 = (int64_t)0x94D049BB133111EBull;

inline Longs mix(Longs ids) {
    Longs x = (ids + 1) * STEP;
    x = (x ^ (x >> 30)) * MIX1;
    return x ^ (x >> 27);
}

inline Lanes uniform(Longs mixed, const int64_t* keys) {
    Longs bits = (mixed + keys[0]) * keys[1];
    bits = ((bits ^ (bits >> 32)) * MIX2) & INT64_MAX;
    Lanes v = __builtin_convertvector(bits, Lanes) * 0x1p-63f;
    return at_most(at_least(v, 0x1p-64f), 1.0f - 0x1p-24f);
}

inline Lanes gumbel_of(Lanes v) {
    Lanes rest = 1.0f - v;  // log(1 - v), with what the subtraction lost
    return -logarithm((v - (1.0f - rest)) / rest - logarithm(rest));
}

// More than `gumbel_of`, which is below -log(v), by 0.06 at most where noise is great: a logarithm whose mantissa is taken for a straight line.
inline Lanes more_than_gumbel_of(Lanes v) { return (127.0f - __builtin_convertvector((Ints)v, Lanes) * 0x1p-23f) * 0.69314718f + 1e-4f; }

// Noise under each key [rows, 2] of `count` token ids, those of a row `stride` after the row before's.
void gumbel(const int64_t* keys, const int64_t* ids, float* out, int64_t rows, int64_t count, int64_t stride) {
    constexpr int64_t CHUNK = 32;  // vectors of ids that are mixed once for all rows
#pragma omp parallel for
    for (int64_t chunk = 0; chunk < count; chunk += CHUNK * WIDTH) {
        Longs mixed[CHUNK] = {};
        int64_t end = std::min(chunk + CHUNK * WIDTH, count);
        for (int64_t row = 0; row < rows; row++) {
            if (!row || stride) {
                memcpy(mixed, ids + row * stride + chunk, (end - chunk) * sizeof(int64_t));
                for (Longs& x : mixed) x = mix(x);
            }
            for (int64_t first = chunk; first < end; first += WIDTH)
                store(out + row * count + first, gumbel_of(uniform(mixed[(first - chunk) / WIDTH], keys + 2 * row)), end - first);
        }
    }
}

// As `load`; what is missing is less than anything.
inline Lanes load_or_least(const float* from, int64_t count) {
    if (count >= WIDTH) return load(from);
    Lanes value = all(-INFINITY);
    for (int64_t i = 0; i < count; i++) value[i] = from[i];
    return value;
}

// Of each row [rows, size] the greatest, where it first is, and where wanted the sum of exp(x - greatest). NaN is the greatest.
void best_of_rows(const float* x, float* best, int64_t* index, float* exponentials, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const float* from = x + row * size;
        Lanes most = all(-INFINITY), total = {};
        Ints where = {}, strange = {}, at;
        for (int i = 0; i < WIDTH; i++) at[i] = i;
        for (int64_t i = 0; i < size; i += WIDTH, at += WIDTH) {
            Lanes value = load_or_least(from + i, size - i);
            Ints greater = value > most;
            most = greater ? value : most, where = greater ? at : where, strange |= value != value;
        }
        float top = largest(most);
        int64_t first = size - 1;
        for (int i = 0; i < WIDTH; i++) {
            if (most[i] == top && where[i] < first) first = where[i];
            if (strange[i]) top = NAN;
        }
        best[row] = top, index[row] = first;
        if (!exponentials) continue;
        float base = top > -3.4e38f ? top : -3.4e38f;
        for (int64_t i = 0; i < size; i += WIDTH) {
            Lanes value = load_or_least(from + i, size - i);
            total += value == -INFINITY ? Lanes{} : exponential(value - base);
        }
        exponentials[row] = top == top ? sum(total) : NAN;
    }
}

// A bit for each of the values that are at least so great.
inline uint32_t reaching(Lanes values, float least) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
    Ints reach = values >= least;
    uint32_t bits = 0;
    for (int i = 0; i < WIDTH; i++) bits |= (reach[i] & 1u) << i;
    return bits;
#endif
}

// The `few` best of a row: the greater value first, among equals the lower index.
class Best {
    int64_t few, limit;
    std::vector<std::pair<float, int64_t>> found;  // by the negative, so that pairs compare as they should

  public:
    float least = -INFINITY;  // what is below it is not among them

    explicit Best(int64_t few) : few(few), limit(few + 2 * WIDTH) { found.reserve(limit + WIDTH); }

    void offer(Lanes values, int64_t first, int64_t count) {
        uint32_t reach = reaching(values, least);
        if (count < WIDTH) reach &= (1u << count) - 1;
        for (; reach; reach &= reach - 1) {
            int i = __builtin_ctz(reach);
            found.emplace_back(-values[i], first + i);
        }
        if ((int64_t)found.size() < limit) return;
        std::nth_element(found.begin(), found.begin() + few - 1, found.end());
        found.resize(few);
        least = -found[few - 1].first;
    }

    // In order; fewer than wanted where there was too much NaN: then -infinity at index 0.
    void write(float* values, int64_t* index) {
        int64_t count = std::min<int64_t>(few, found.size());
        std::partial_sort(found.begin(), found.begin() + count, found.end());
        for (int64_t i = 0; i < few; i++) {
            values[i] = i < count ? -found[i].first : -INFINITY;
            index[i] = i < count ? found[i].second : 0;
        }
    }
};

// The first `few` of each row, in order.
void best_few(const float* x, float* values, int64_t* index, int64_t rows, int64_t size, int64_t few) {
#pragma omp parallel for if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) {
        Best best(few);
        for (int64_t i = 0; i < size; i += WIDTH) {
            Lanes value = load_or_least(x + row * size + i, size - i);
            if (reaching(value, best.least)) best.offer(value, i, size - i);
        }
        best.write(values + row * few, index + row * few);
    }
}

// A row of logits, as `draws.py` draws from it.
struct Drawn {
    const float* logits;
    float temperature, greatest;  // `greatest` of the scaled logits
    const int64_t* keys;
    double *masses, *counts;  // of each bin; null where not wanted
};

constexpr int64_t PIECE = 32 * WIDTH;  // of a row

// Sums of exp(scaled - greatest), and numbers of tokens, in `bins` bins, `per_unit` of them a unit, downwards from the greatest's; all below
// them in the last.
class Histogram {
    static constexpr int PARTS = 4;  // neighbours are often in one bin, and need not wait for each other
    const Drawn& row;
    int64_t bins;
    float per_unit;
    Lanes top;
    std::vector<double> parts;

    Lanes bin_of(Lanes value) const { return at_most(at_least(floor_of(value * per_unit), -0x1p30f), 0x1p30f); }

  public:
    Histogram(const Drawn& row, int64_t bins, float per_unit)
        : row(row), bins(bins), per_unit(per_unit), top(bin_of(all(row.greatest))), parts(row.masses ? PARTS * (bins + 1) : 0) {}

    // A piece of the row, with room for whole vectors. One pass for the vectors, one for their parts: neither waits for the other.
    void add(const float* scaled, int64_t count) {
        int32_t bin[PIECE];
        double weight[PIECE], *sums = parts.data();
        for (int64_t i = 0; i < count; i += WIDTH) {
            Lanes value = load(scaled + i), below = top - bin_of(value);
            below = below > 0.0f ? below : Lanes{};  // NaN, too
            Ints at = __builtin_convertvector(at_most(below, bins), Ints);
            Doubles weights = __builtin_convertvector(exponential(value - row.greatest), Doubles);
            memcpy(bin + i, &at, sizeof at), memcpy(weight + i, &weights, sizeof weights);
        }
        int64_t i = 0;
        for (; i + PARTS <= count; i += PARTS)
            for (int64_t part = 0; part < PARTS; part++) sums[part * (bins + 1) + bin[i + part]] += weight[i + part];
        for (; i < count; i++) sums[bin[i]] += weight[i];
        for (i = 0; row.counts && i < count; i++) row.counts[bin[i]] += 1;
    }

    void finish() const {
        for (int64_t i = 0; i < (int64_t)parts.size(); i++) row.masses[i % (bins + 1)] += parts[i];
    }
};

// Of each row's logits, divided by its temperature, the `few` best with noise, where they are and what they were without; and its histogram.
// Noise is computed only where it may make a token one of the best.
void draw(const Drawn* drawn, int64_t first_token, float* noised, int64_t* index, float* scaled, int64_t rows, int64_t size, int64_t few,
          int64_t bins, float per_unit) {
    std::vector<Longs> mixed((size + WIDTH - 1) / WIDTH);
#pragma omp parallel
    {
#pragma omp for
        for (int64_t i = 0; i < (int64_t)mixed.size(); i++) {
            Longs ids;
            for (int lane = 0; lane < WIDTH; lane++) ids[lane] = first_token + i * WIDTH + lane;
            mixed[i] = mix(ids);
        }
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; row++) {
            const Drawn& of = drawn[row];
            Best best(few);
            Histogram histogram(of, bins, per_unit);
            float piece[PIECE];
            for (int64_t first = 0; first < size; first += PIECE) {
                int64_t end = std::min(first + PIECE, size);
                for (int64_t i = first; i < end; i += WIDTH) store(piece + i - first, load_or_least(of.logits + i, end - i) / of.temperature);
                if (of.masses) histogram.add(piece, end - first);
                for (int64_t i = first; i < end; i += WIDTH) {
                    Lanes value = load(piece + i - first), v = uniform(mixed[i / WIDTH], of.keys);
                    if (reaching(value + more_than_gumbel_of(v), best.least)) best.offer(value + gumbel_of(v), i, end - i);
                }
            }
            if (of.masses) histogram.finish();
            best.write(noised + row * few, index + row * few);
            for (int64_t i = row * few; i < (row + 1) * few; i++) scaled[i] = of.logits[index[i]] / of.temperature;
        }
    }
}

// Processors with matrix units (AMX) leave the product to oneDNN, which uses them.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define MULTIPLIES 1

// A packed matrix: panels of 32 outputs, in each the inputs two by two, [panels, pairs, PANEL] pairs of bfloat16. Of a *gated* one a panel is
// 16 outputs of the gate, the upper half of the matrix, and the same 16 of what it is multiplied with.
constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t TILE = 12;   // rows whose sums fill the registers
constexpr int FEW = 5;         // rows whose products take no longer than a line takes from memory to the nearest cache

// Elements 2 * pair and 2 * pair + 1 of a row; zero beyond its end.
inline uint32_t pair_of(const bfloat16* row, int64_t pair, int64_t size) {
    if (2 * pair + 1 == size) return row[2 * pair].bits;
    uint32_t both;
    memcpy(&both, row + 2 * pair, sizeof both);
    return both;
}

// The rows of a panel; null where there is none.
void pack_panel(const bfloat16* const* rows, uint32_t* packed, int64_t inputs) {
    int64_t pairs = (inputs + 1) / 2, whole = inputs / 2 / WIDTH * WIDTH;
    for (int64_t column = 0; column < PANEL; column += WIDTH) {
        for (int64_t pair = 0; pair < whole; pair += WIDTH) {
            Ints block[WIDTH] = {};
            for (int i = 0; i < WIDTH; i++)
                if (rows[column + i]) memcpy(&block[i], rows[column + i] + 2 * pair, sizeof block[i]);
            transpose(block);
            for (int i = 0; i < WIDTH; i++) memcpy(packed + (pair + i) * PANEL + column, &block[i], sizeof block[i]);
        }
        for (int64_t pair = whole; pair < pairs; pair++)
            for (int i = 0; i < WIDTH; i++) packed[pair * PANEL + column + i] = rows[column + i] ? pair_of(rows[column + i], pair, inputs) : 0;
    }
}

void pack_matrix(const bfloat16* weight, uint32_t* packed, int64_t outputs, int64_t inputs, bool gated) {
    int64_t pairs = (inputs + 1) / 2, panels = gated ? (outputs / 2 + WIDTH - 1) / WIDTH : (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++) {
        const bfloat16* rows[PANEL];
        for (int64_t column = 0; column < PANEL; column++) {
            int64_t output = panel * PANEL + column, end = outputs;
            if (gated) {
                end = column < WIDTH ? outputs / 2 : outputs;
                output = panel * WIDTH + column % WIDTH + (column < WIDTH ? 0 : outputs / 2);
            }
            rows[column] = output < end ? weight + output * inputs : nullptr;
        }
        pack_panel(rows, packed + panel * pairs * PANEL, inputs);
    }
}

// Blocks of `size` numbers: those of the first half come to the even places, those of the other half to the odd ones.
void interleave(bfloat16* x, int64_t blocks, int64_t size) {
    auto source = [=](int64_t place) { return place % 2 * (blocks / 2) + place / 2; };
    std::vector<int64_t> firsts;  // one place of each cycle of the permutation
    std::vector<bool> seen(blocks);
    for (int64_t first = 0; first < blocks; first++) {
        if (!seen[first]) firsts.push_back(first);
        for (int64_t place = first; !seen[place]; place = source(place)) seen[place] = true;
    }
    constexpr int64_t PART = 4096;  // of a block, that travels through all cycles by itself
#pragma omp parallel for
    for (int64_t part = 0; part < size; part += PART) {
        bfloat16 kept[PART];
        size_t bytes = std::min(PART, size - part) * sizeof(bfloat16);
        for (int64_t first : firsts) {
            int64_t place = first;
            memcpy(kept, x + first * size + part, bytes);
            for (int64_t from; (from = source(place)) != first; place = from) memcpy(x + place * size + part, x + from * size + part, bytes);
            memcpy(x + place * size + part, kept, bytes);
        }
    }
}

// In the memory of the weight itself: panels that are full, of an even number of inputs, are as large as their rows.
void pack_in_place(bfloat16* weight, int64_t outputs, int64_t inputs, bool gated) {
    if (gated) interleave(weight, outputs / WIDTH, WIDTH * inputs);
#pragma omp parallel
    {
        std::vector<bfloat16> copy(PANEL * inputs);
        const bfloat16* rows[PANEL];
        for (int64_t row = 0; row < PANEL; row++) rows[row] = copy.data() + row * inputs;
#pragma omp for
        for (int64_t first = 0; first < outputs; first += PANEL) {
            memcpy(copy.data(), weight + first * inputs, copy.size() * sizeof(bfloat16));
            pack_panel(rows, (uint32_t*)(weight + first * inputs), inputs);
        }
    }
}

typedef uint32_t Pair __attribute__((aligned(2), may_alias));  // two neighbouring inputs of a row

// `rows` rows of x, `x_stride` pairs apart, times one panel. Memory is asked for the panel `near` words ahead (0: not), into the nearest cache,
// and for `far`, into the one behind it: `stride` words for each pair, unless rows are few.
template <int rows, bool gated>
void multiply_tile(const Pair* x, int64_t x_stride, const uint32_t* panel, int64_t pairs, int64_t near, const uint32_t* far, int64_t stride,
                   const float* bias, bfloat16* y, int64_t y_stride, int64_t columns) {
    Lanes sums[rows][2], added[2] = {load(bias), load(bias + WIDTH)};
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sums[row][0] = added[0], sums[row][1] = added[1];
    // Four pointers and a distance reach all rows: more of them would not stay in registers.
    const Pair *x0 = x, *x1 = x + (rows > 1) * x_stride, *x2 = x + (rows > 2) * 2 * x_stride, *x3 = x + (rows > 3) * 3 * x_stride;
    int64_t down = 4 * x_stride;
    for (int64_t pair = 0; pair < pairs; pair++, panel += PANEL, x0++, x1++, x2++, x3++, far += stride) {
        asm("" : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3), "+r"(down));
        const Pair* const first[4] = {x0, x1, x2, x3};
        if (near) __builtin_prefetch(panel + near), __builtin_prefetch(panel + near + WIDTH);
        if (rows > FEW)
            for (int64_t word = 0; word < stride; word += WIDTH) __builtin_prefetch(far + word, 0, 2);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            uint32_t both = first[row % 4][row / 4 * down];
            sums[row][0] = add_products(sums[row][0], panel, both);
            sums[row][1] = add_products(sums[row][1], panel + WIDTH, both);
        }
    }
    // What registers hold is not indexed by a variable, or it would go through memory, where it waits for the stores of the tile before.
    constexpr int64_t wide = gated ? WIDTH : PANEL;
    bfloat16 last[rows * wide], *to = columns < wide ? last : y;
    int64_t to_stride = columns < wide ? wide : y_stride;
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++, to += to_stride) {
        if (gated) store(to, silu(sums[row][0]) * sums[row][1]);
        else store(to, sums[row][0]), store(to + WIDTH, sums[row][1]);
    }
    if (columns < wide)
        for (int row = 0; row < rows; row++) memcpy(y + row * y_stride, last + row * wide, columns * sizeof(bfloat16));
}

typedef void (*Tile)(const Pair*, int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t, const float*, bfloat16*, int64_t, int64_t);
template <bool gated>
const Tile TILES_OF[TILE] = {multiply_tile<1, gated>, multiply_tile<2, gated>,  multiply_tile<3, gated>,  multiply_tile<4, gated>,
                             multiply_tile<5, gated>, multiply_tile<6, gated>,  multiply_tile<7, gated>,  multiply_tile<8, gated>,
                             multiply_tile<9, gated>, multiply_tile<10, gated>, multiply_tile<11, gated>, multiply_tile<12, gated>};

// This and the structures below are laid out as in `native_blocks.py`. `most`: rows that are multiplied together.
struct Matrix {
    const uint32_t* packed;
    const bfloat16* bias;
    int64_t outputs, inputs, most;
};

// Rows of x that are multiplied together, in tiles as equal as they go.
struct Group {
    int64_t first, count, tiles;

    Group(int64_t first, int64_t count) : first(first), count(count), tiles((count + TILE - 1) / TILE) {}
    int64_t begin(int64_t tile) const { return tile * (count / tiles) + std::min(tile, count % tiles); }
    int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

// `most` rows of x at a time stay in the cache while the panels pass by; nobody waits for others before all is done.
template <bool gated> void multiply(const bfloat16* x, const Matrix& matrix, bfloat16* y, int64_t rows) {
    const uint32_t* packed = matrix.packed;
    const bfloat16* bias = matrix.bias;
    int64_t outputs = matrix.outputs, inputs = matrix.inputs, most = matrix.most;
    constexpr int64_t wide = gated ? WIDTH : PANEL;  // results of a panel
    int64_t pairs = (inputs + 1) / 2, width = gated ? outputs / 2 : outputs, panels = (width + wide - 1) / wide;
    std::vector<uint32_t> even;  // rows of an odd number of inputs, and a zero
    if (inputs % 2) {
        even.resize(rows * pairs);
        for (int64_t row = 0; row < rows; row++) memcpy(even.data() + row * pairs, x + row * inputs, inputs * sizeof(bfloat16));
    }
    const Pair* rows_of_pairs = inputs % 2 ? (const Pair*)even.data() : (const Pair*)x;
#pragma omp parallel
    for (int64_t first = 0; first < rows; first += most) {
        const Group group(first, std::min(most, rows - first));
#pragma omp for schedule(guided, 2) nowait
        for (int64_t panel = 0; panel < panels; panel++) {
            const uint32_t *this_one = packed + panel * pairs * PANEL, *next = this_one + pairs * PANEL;
            float added[PANEL] = {};
            for (int64_t column = 0; bias && column < PANEL; column++) {
                int64_t output = panel * wide + column % wide;
                if (output >= width) continue;
                uint32_t bits = (uint32_t)bias[output + column / wide * width].bits << 16;
                memcpy(added + column, &bits, sizeof bits);
            }
            for (int64_t tile = 0; tile < group.tiles; tile++) {
                // The first tile brings the panel near for all.
                int64_t begin = group.begin(tile), size = group.size(tile), near = tile ? 0 : 16 * PANEL, stride = 0;
                const uint32_t* far = nullptr;
                // Each half of the next panel.
                if (group.tiles > 1 && tile < 2 && panel + 1 < panels) far = next + tile * pairs * WIDTH, stride = WIDTH;
                // A lone tile runs at the speed of memory, which the nearest cache alone keeps up only while the products are soon done.
                if (group.tiles == 1 && size <= FEW) near = 64 * PANEL;
                if (group.tiles == 1 && size > FEW) near = 0, far = this_one + 64 * PANEL, stride = PANEL;
                TILES_OF<gated>[size - 1](rows_of_pairs + (first + begin) * pairs, pairs, this_one, pairs, near, far, stride, added,
                                          y + (first + begin) * width + panel * wide, width, width - panel * wide);
            }
        }
    }
}

struct Layer {
    Matrix qkv, output, gate_up, down;
    const bfloat16 *attention_norm, *mlp_norm, *q_norm, *k_norm;
    const int32_t* groups;
    int64_t heads, kv_heads, head_dim, window;
    float attention_eps, attention_offset, mlp_eps, mlp_offset, head_eps, head_offset, scale, softcap;
};

// What a layer reads of the step: the pools of the cache, cos and sin of the tokens and of how many numbers of a head.
struct Reads {
    bfloat16 *keys, *values;
    const bfloat16 *cos, *sin;
    int64_t rotated;
};

struct Step {
    const Layer* layers;
    const Reads* reads;
    bfloat16 *x, *delta, *normed, *qkv, *mixed, *gated;  // [tokens, ...]
    const int64_t* slots;
    const int32_t *offsets, *contexts, *tables;
    int64_t tokens, hidden, block_size, spans, table_width;
};

// The segment of `shared_memory.py`, by whose rules sums are made here.
struct Segment {
    int64_t* flags;
    char* slots;
    int64_t rank, ranks, slot, line, checks, sequence, posted;

    bfloat16* of(int64_t of_rank, int64_t number) const { return (bfloat16*)(slots + ((number & 1) * ranks + of_rank) * slot); }

    void post() {
        __atomic_store_n(flags + rank * line, ++sequence, __ATOMIC_RELEASE);
        posted = 1;
    }

    bool all_posted() const {
        int64_t left = checks;
        for (int64_t peer = 0; peer < ranks; peer++)
            while (__atomic_load_n(flags + peer * line, __ATOMIC_ACQUIRE) < sequence) {
                if (!left--) return false;
                __builtin_ia32_pause();
            }
        return true;
    }

    void sum(bfloat16* to, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH) {
            Lanes total = load(of(0, sequence) + i, size - i);
            for (int64_t peer = 1; peer < ranks; peer++) total += load(of(peer, sequence) + i, size - i);
            store(to + i, total, size - i);
        }
        posted = 0;
    }
};

void attention_half(const Layer& layer, const Reads& reads, const Step& s, const bfloat16* delta, bfloat16* to) {
    int64_t width = (layer.heads + 2 * layer.kv_heads) * layer.head_dim, mixed = layer.heads * layer.head_dim;
    add_rms_norm(s.x, delta, layer.attention_norm, s.normed, s.tokens, s.hidden, layer.attention_eps, layer.attention_offset);
    multiply<false>(s.normed, layer.qkv, s.qkv, s.tokens);
    rotate_and_cache(s.qkv, reads.cos, reads.sin, layer.q_norm, layer.k_norm, layer.head_eps, layer.head_offset, s.slots, reads.keys, reads.values,
                     s.tokens, layer.heads, layer.kv_heads, layer.head_dim, reads.rotated, s.block_size);
    paged_attention(s.qkv, s.mixed, reads.keys, reads.values, s.offsets, s.contexts, s.tables, layer.groups, s.spans, layer.kv_heads, layer.head_dim,
                    width, mixed, s.block_size, s.table_width, layer.window, layer.scale, layer.softcap);
    multiply<false>(s.mixed, layer.output, to, s.tokens);
}

void mlp_half(const Layer& layer, const Step& s, bfloat16* to) {
    add_rms_norm(s.x, s.delta, layer.mlp_norm, s.normed, s.tokens, s.hidden, layer.mlp_eps, layer.mlp_offset);
    multiply<true>(s.normed, layer.gate_up, s.gated, s.tokens);
    multiply<false>(s.gated, layer.down, to, s.tokens);
}

// Add `delta` to rows of `x`, normalize the sum, and multiply it; the results, in bfloat16 as elsewhere, come as float32.
void logits(bfloat16* x, const bfloat16* delta, const bfloat16* norm, float eps, float offset, const Matrix& head, float* out, int64_t rows) {
    std::unique_ptr<bfloat16[]> normed(new bfloat16[rows * head.inputs]), products(new bfloat16[rows * head.outputs]);
    add_rms_norm(x, delta, norm, normed.get(), rows, head.inputs, eps, offset);
    multiply<false>(normed.get(), head, products.get(), rows);
    int64_t size = rows * head.outputs;
#pragma omp parallel for
    for (int64_t i = 0; i < size; i += WIDTH) store(out + i, load(products.get() + i, size - i), size - i);
}

// Halves of layers, attention and mlp in turn, from `half` to `end`; what the last adds to `x` is left in `delta`. Returns where it stopped:
// at the end; or at a half whose sum, posted here, other ranks are late for; or, with other ranks but no segment, after a half that is still to
// be summed.
int64_t run_halves(const Step& s, Segment* segment, bool alone, int64_t half, int64_t end) {
    while (half < end) {
        if (!segment || !segment->posted) {
            bfloat16* to = segment ? segment->of(segment->rank, segment->sequence + 1) : s.delta;
            if (half % 2) mlp_half(s.layers[half / 2], s, to);
            else attention_half(s.layers[half / 2], s.reads[half / 2], s, half ? s.delta : nullptr, to);
            if (segment) segment->post();
        }
        if (segment) {
            if (!segment->all_posted()) break;
            segment->sum(s.delta, s.tokens * s.hidden);
        }
        half++;
        if (!segment && !alone) break;
    }
    return half;
}
#endif

}  // namespace

#ifdef MULTIPLIES
extern "C" int64_t run_halves_bfloat16(const Step* step, Segment* segment, bool alone, int64_t half, int64_t end) {
    return run_halves(*step, segment, alone, half, end);
}
extern "C" void pack_matrix_bfloat16(const bfloat16* weight, uint32_t* packed, int64_t outputs, int64_t inputs, bool gated) {
    pack_matrix(weight, packed, outputs, inputs, gated);
}
extern "C" void pack_in_place_bfloat16(bfloat16* weight, int64_t outputs, int64_t inputs, bool gated) {
    pack_in_place(weight, outputs, inputs, gated);
}
extern "C" void logits_bfloat16(bfloat16* x, const bfloat16* delta, const bfloat16* norm, float eps, float offset, const uint32_t* packed,
                                float* out, int64_t rows, int64_t outputs, int64_t inputs, int64_t most) {
    logits(x, delta, norm, eps, offset, {packed, nullptr, outputs, inputs, most}, out, rows);
}
extern "C" void multiply_bfloat16(const bfloat16* x, const uint32_t* packed, const bfloat16* bias, bfloat16* y, int64_t rows, int64_t outputs,
                                  int64_t inputs, int64_t most, bool gated) {
    (gated ? multiply<true> : multiply<false>)(x, {packed, bias, outputs, inputs, most}, y, rows);
}
#endif

extern "C" void best_of_rows_float(const float* x, float* best, int64_t* index, float* exponentials, int64_t rows, int64_t size) {
    best_of_rows(x, best, index, exponentials, rows, size);
}
// Beside each greatest its token id, in as many bits.
extern "C" void greatest_float(const float* x, float* greatest, int64_t first_token, int64_t rows, int64_t size) {
    std::vector<float> best(rows);
    std::vector<int64_t> index(rows);
    best_of_rows(x, best.data(), index.data(), nullptr, rows, size);
    for (int64_t row = 0; row < rows; row++) {
        int32_t id = first_token + index[row];
        memcpy(greatest + 2 * row, &best[row], sizeof best[row]), memcpy(greatest + 2 * row + 1, &id, sizeof id);
    }
}
extern "C" void best_few_float(const float* x, float* values, int64_t* index, int64_t rows, int64_t size, int64_t few) {
    best_few(x, values, index, rows, size, few);
}
extern "C" void gumbel_noise(const int64_t* keys, const int64_t* ids, float* out, int64_t rows, int64_t count, int64_t stride) {
    gumbel(keys, ids, out, rows, count, stride);
}
extern "C" void draw_rows(const Drawn* drawn, int64_t first_token, float* noised, int64_t* index, float* scaled, int64_t rows, int64_t size,
                          int64_t few, int64_t bins, float per_unit) {
    draw(drawn, first_token, noised, index, scaled, rows, size, few, bins, per_unit);
}

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
    extern "C" void paged_attention_##T(const T* q, T* out, const T* keys, const T* values, const int32_t* offsets,                      \
                                        const int32_t* contexts, const int32_t* tables, const int32_t* groups, int64_t spans, int64_t kv_heads, \
                                        int64_t head_dim, int64_t q_stride, int64_t out_stride, int64_t block_size,                      \
                                        int64_t table_width, int64_t window, float scale, float softcap) {                               \
        paged_attention(q, out, keys, values, offsets, contexts, tables, groups, spans, kv_heads, head_dim, q_stride, out_stride,           \
                        block_size, table_width, window, scale, softcap);                                                                \
    }                                                                                                                                    \
    extern "C" void silu_and_multiply_##T(const T* gate_up, T* out, int64_t rows, int64_t size) {                                        \
        silu_and_multiply(gate_up, out, rows, size);                                                                                     \
    }

EXPORT(float)
EXPORT(bfloat16)
