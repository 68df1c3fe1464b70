// What stands between the matrix products of a decoder layer, for a few dozen rows, each loop one pass over its rows.
// Same arithmetic as the torch functions in rows.py, which they are tested against. Built by native.py, called from there.

#include "numbers.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t LIGHT = 8192;  // numbers that one thread is done with before a second one has begun

template <typename T> void norm_row(const T* x, const T* __restrict__ weight, T* __restrict__ out, int64_t width, float eps) {
    float sum = 0;
    for (int64_t i = 0; i < width; i++) sum += wide(x[i]) * wide(x[i]);
    const float scale = 1.0f / std::sqrt(sum / width + eps);
    for (int64_t i = 0; i < width; i++) put(out[i], rounded<T>(wide(x[i]) * scale) * wide(weight[i]));
}

// total = x + delta (delta may be null: total is not written); out = norm(total) * weight (out may be null)
template <typename T>
void add_norm(const T* x, const T* delta, const T* weight, T* total, T* out, int64_t rows, int64_t width, float eps) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * width;
        if (delta) {
            const T* added = delta + r * width;
            T* __restrict__ sum = total + r * width;
            for (int64_t i = 0; i < width; i++) put(sum[i], wide(row[i]) + wide(added[i]));
            row = sum;
        }
        if (out) norm_row(row, weight, out + r * width, width, eps);
    }
}

template <typename T>
void turn_row(const T* __restrict__ x, const T* __restrict__ c, const T* __restrict__ s, T* __restrict__ out,
              int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = wide(x[i]), z = wide(x[i + half]);
        put(out[i], rounded<T>(a * wide(c[i])) - rounded<T>(z * wide(s[i])));
        put(out[i + half], rounded<T>(z * wide(c[i + half])) + rounded<T>(a * wide(s[i + half])));
    }
}

// mixed [batch, rows, heads + 2 groups, width] -> queries [batch, heads, rows, width], keys and values [batch, groups,
// slots, width]; queries and keys turned by cos and sin [batch, rows, width], after a norm by weights [heads + groups,
// width] unless those are null. The rows of each sequence go to the slots from firsts[batch] on.
template <typename T>
void rotate(const T* mixed, const T* cos, const T* sin, const T* weights, T* queries, T* keys, T* values,
            const int64_t* firsts, int64_t slots, int64_t batch, int64_t rows, int64_t heads, int64_t groups, int64_t width,
            float eps) {
    const int64_t half = width / 2, all = heads + 2 * groups;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < batch * rows; at++) {
        const int64_t b = at / rows, r = at % rows;
        const T *c = cos + at * width, *s = sin + at * width, *head = mixed + at * all * width;
        T normed[1024];
        for (int64_t h = 0; h < all; h++, head += width) {
            const int64_t slot = firsts[b] + r;
            T* out = h < heads            ? queries + ((b * heads + h) * rows + r) * width
                     : h < heads + groups ? keys + ((b * groups + h - heads) * slots + slot) * width
                                          : values + ((b * groups + h - heads - groups) * slots + slot) * width;
            if (h >= heads + groups) {
                std::memcpy(out, head, width * sizeof(T));
                continue;
            }
            const T* x = head;
            if (weights) {
                norm_row(head, weights + h * width, normed, width, eps);
                x = normed;
            }
            turn_row(x, c, s, out, half);
        }
    }
}

// gate_up [rows, 2 width] -> silu(gate) * up [rows, width]
template <typename T> void gate(const T* gate_up, T* out, int64_t rows, int64_t width) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* __restrict__ from = gate_up + 2 * r * width;
        T* __restrict__ to = out + r * width;
        const int64_t whole = width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) put_gated_lanes(to + i, from + i, from + width + i);
        for (int64_t i = whole; i < width; i++) put_gated(to[i], from[i], from[i + width]);
    }
}

// the largest of x[0] ... x[count - 1]
template <typename T> float most(const T* x, int64_t count) {
    float largest = wide(x[0]);
    for (int64_t i = 1; i < count; i++) largest = std::fmax(largest, wide(x[i]));
    return largest;
}

// Of bfloat16 by whole numbers in the same order, twice as many at a time.
inline float most(const bf16* x, int64_t count) {
    const auto ordered = [](int16_t bits) { return int16_t(bits ^ (bits >> 15 & 0x7fff)); };  // and back again
    int16_t largest = ordered(int16_t(x[0].bits));
    for (int64_t i = 1; i < count; i++) largest = std::max(largest, ordered(int16_t(x[i].bits)));
    return wide(bf16{uint16_t(ordered(largest))});
}

// sum of exp(x), by exp(top)
template <typename T> float sum_exp(const T* x, float top, int64_t width) {
    float sum = 0;
    for (int64_t i = 0; i < width; i++) sum += std::exp(wide(x[i]) - top);
    return sum;
}

// A row of logits is cut into as many parts, part p from here on: one thread reads what it has written itself, as far as can be.
constexpr int64_t PARTS = 8;
constexpr float LEAST = -3e38f;  // of a part without numbers
inline int64_t start_of(int64_t part, int64_t width) { return width * part / PARTS; }

// log_softmax(row of node)[token] for some nodes of every sequence
template <typename T>
void log_probs(const T* x, const int64_t* nodes, const int64_t* tokens, float* out, int64_t batch, int64_t rows,
               int64_t picks, int64_t width) {
    const int64_t all = batch * picks;
    const auto row = [&](int64_t i) { return x + (i / picks * rows + nodes[i]) * width; };
    std::vector<float> tops(PARTS * all, LEAST), sums(PARTS * all);
#pragma omp parallel for schedule(static) if (all * width > LIGHT)
    for (int64_t task = 0; task < PARTS * all; task++) {
        const int64_t first = start_of(task / all, width), count = start_of(task / all + 1, width) - first;
        if (count == 0) continue;
        const T* part = row(task % all) + first;
        tops[task] = most(part, count);
        sums[task] = sum_exp(part, tops[task], count);
    }
    for (int64_t i = 0; i < all; i++) {
        float top = tops[i], sum = 0;
        for (int64_t task = i; task < PARTS * all; task += all) top = std::fmax(top, tops[task]);
        for (int64_t task = i; task < PARTS * all; task += all) sum += sums[task] * std::exp(tops[task] - top);
        out[i] = wide(row(i)[tokens[i]]) - top - std::log(sum);
    }
}

// Of `experts` embeddings [experts, width] the `top` that a state's direction likes best, weighed by softmax over those: state [rows,
// width_in], router [experts, width_in] -> out [rows, width]
template <typename T>
void mix(const T* state, const T* router, const T* embeddings, T* out, int64_t rows, int64_t width_in, int64_t width, int64_t experts,
         int64_t top) {
    std::vector<float> normed(width_in), scores(experts), mixed(width);
    std::vector<int64_t> order(experts);
    for (int64_t r = 0; r < rows; r++, state += width_in, out += width) {
        float square = 0;
        for (int64_t i = 0; i < width_in; i++) square += wide(state[i]) * wide(state[i]);
        const float by = 1 / std::sqrt(square / width_in + 1e-6f);
        for (int64_t i = 0; i < width_in; i++) normed[i] = wide(state[i]) * by;
        for (int64_t e = 0; e < experts; e++) {
            const T* its = router + e * width_in;
            float sum = 0;
            for (int64_t i = 0; i < width_in; i++) sum += normed[i] * wide(its[i]);
            scores[e] = sum;
        }
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
        float total = 0;
        for (int64_t k = 0; k < top; k++) total += std::exp(scores[order[k]] - scores[order[0]]);
        std::fill(mixed.begin(), mixed.end(), 0);
        for (int64_t k = 0; k < top; k++) {
            const float weight = std::exp(scores[order[k]] - scores[order[0]]) / total;
            const T* its = embeddings + order[k] * width;
            for (int64_t i = 0; i < width; i++) mixed[i] += weight * wide(its[i]);
        }
        for (int64_t i = 0; i < width; i++) put(out[i], mixed[i]);
    }
}

constexpr int64_t BLOCK = 64;  // numbers that are passed over together where none is large enough

// a row's k largest of log_softmax(x), largest first, and where they are; of equal ones the first
template <typename T> void best_of(const T* x, float* values, int64_t* places, int64_t width, int64_t k) {
    int64_t found = 0;
    for (int64_t start = 0; start < width; start += BLOCK) {
        const int64_t end = start + BLOCK < width ? start + BLOCK : width;
        if (found == k && !(most(x + start, end - start) > values[k - 1])) continue;
        for (int64_t i = start; i < end; i++) {
            const float value = wide(x[i]);
            if (found == k && !(value > values[k - 1])) continue;
            int64_t at = found < k ? found++ : k - 1;
            for (; at > 0 && value > values[at - 1]; at--) {
                values[at] = values[at - 1];
                places[at] = places[at - 1];
            }
            values[at] = value;
            places[at] = i;
        }
    }
    const float total = values[0] + std::log(sum_exp(x, values[0], width));
    for (int64_t j = 0; j < k; j++) values[j] -= total;
}

template <typename T> void best(const T* x, float* values, int64_t* places, int64_t rows, int64_t width, int64_t k) {
#pragma omp parallel for if (rows * width > LIGHT)
    for (int64_t r = 0; r < rows; r++) best_of(x + r * width, values + r * k, places + r * k, width, k);
}

// where the first of x[0] ... x[count - 1] is that equals `number`
template <typename T> int64_t find(const T* x, float number, int64_t count) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t end = start + BLOCK < count ? start + BLOCK : count;
        bool any = false;
        for (int64_t i = start; i < end; i++) any |= wide(x[i]) == number;
        for (int64_t i = start; any && i < end; i++)
            if (wide(x[i]) == number) return i;
    }
    return 0;
}

// where the largest number of each row is; of equal ones the first
template <typename T> void argmax(const T* x, int64_t* places, int64_t rows, int64_t width) {
    std::vector<float> tops(PARTS * rows, LEAST);
#pragma omp parallel for schedule(static) if (rows * width > LIGHT)
    for (int64_t task = 0; task < PARTS * rows; task++) {
        const int64_t first = start_of(task / rows, width), count = start_of(task / rows + 1, width) - first;
        if (count > 0) tops[task] = most(x + task % rows * width + first, count);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t best = 0;
        for (int64_t part = 1; part < PARTS; part++)
            if (tops[part * rows + r] > tops[best * rows + r]) best = part;
        const int64_t first = start_of(best, width), count = start_of(best + 1, width) - first;
        places[r] = first + find(x + r * width + first, tops[best * rows + r], count);
    }
}

}  // namespace

#define EXPORT(T)                                                                                                      \
    extern "C" void add_norm_##T(const T* x, const T* d, const T* w, T* t, T* o, int64_t rows, int64_t n, float eps) {  \
        _Pragma("omp parallel if (rows * n > LIGHT)") add_norm(x, d, w, t, o, rows, n, eps);                           \
    }                                                                                                                  \
    extern "C" void rotate_##T(const T* m, const T* c, const T* s, const T* w, T* q, T* k, T* v, const int64_t* firsts, \
                               int64_t slots, int64_t batch, int64_t rows, int64_t heads, int64_t groups, int64_t n,   \
                               float eps) {                                                                            \
        _Pragma("omp parallel if (batch * rows * (heads + 2 * groups) * n > LIGHT)")                                   \
            rotate(m, c, s, w, q, k, v, firsts, slots, batch, rows, heads, groups, n, eps);                            \
    }                                                                                                                  \
    extern "C" void gate_##T(const T* x, T* o, int64_t rows, int64_t n) {                                              \
        _Pragma("omp parallel if (rows * n > LIGHT)") gate(x, o, rows, n);                                             \
    }                                                                                                                  \
    extern "C" void best_##T(const T* x, float* v, int64_t* p, int64_t rows, int64_t n, int64_t k) {                   \
        best(x, v, p, rows, n, k);                                                                                    \
    }                                                                                                                 \
    extern "C" void mix_##T(const T* x, const T* router, const T* e, T* o, int64_t rows, int64_t width_in, int64_t n,    \
                            int64_t experts, int64_t top) {                                                            \
        mix(x, router, e, o, rows, width_in, n, experts, top);                                                         \
    }                                                                                                                  \
    extern "C" void argmax_##T(const T* x, int64_t* p, int64_t rows, int64_t n) { argmax(x, p, rows, n); }             \
    extern "C" void log_probs_##T(const T* x, const int64_t* q, const int64_t* t, float* o, int64_t batch, int64_t rows,\
                                  int64_t m, int64_t n) {                                                              \
        log_probs(x, q, t, o, batch, rows, m, n);                                                                      \
    }

EXPORT(float)
EXPORT(bf16)

// What every thread of a team calls (layers.h)
extern "C" void share_add_norm_bf16(const bf16* x, const bf16* d, const bf16* w, bf16* t, bf16* o, int64_t rows, int64_t n, float eps) {
    add_norm(x, d, w, t, o, rows, n, eps);
}
extern "C" void share_rotate_bf16(const bf16* m, const bf16* c, const bf16* s, const bf16* w, bf16* q, bf16* k, bf16* v,
                                  const int64_t* firsts, int64_t slots, int64_t batch, int64_t rows, int64_t heads, int64_t groups,
                                  int64_t n, float eps) {
    rotate(m, c, s, w, q, k, v, firsts, slots, batch, rows, heads, groups, n, eps);
}
extern "C" void share_gate_bf16(const bf16* x, bf16* o, int64_t rows, int64_t n) { gate(x, o, rows, n); }
