// The candidates of draft trees, level by level, in one call: what drafter.py does in torch, for a draft whose weights lie in
// tiles and few bfloat16 rows.

#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// What trees grow from, and where their candidates go: [batch, candidates], those of level 1 first.
struct Growth {
    int64_t depth, num_soft, with_soft;
    const uint16_t* embeddings;  // of all tokens
    const int64_t* lengths;
    const uint16_t *out, *future;  // [batch, width]; states of f as W_j reads them [batch, inputs], or none
    const int64_t* steps;           // from f's anchor to each level [batch, depth]: which W_j
    int64_t *tokens, *parents;
    float *scores, least;  // that a frontier has to promise for a level below it
};

// The nodes whose children are drafted next, best first: `origin` is the row of each one's parent, `candidate` its own index.
struct Frontier {
    std::vector<int64_t> tokens, origin, candidate;
    std::vector<float> scores;
    explicit Frontier(int64_t n) : tokens(n), origin(n), candidate(n), scores(n) {}
};

class Growing {
    const Draft& draft;
    const Shape& s;
    const Growth& g;
    const int64_t k = s.rows, n = s.batch * k, most, known = draft.head.outputs;
    Frontier frontier, next;
    std::vector<uint16_t> hidden, states, embedded, looked, ahead, cos, sin;
    std::vector<float> values;
    std::vector<int64_t> places, first_slots, order;
    std::vector<uint8_t> reach, mask;

public:
    Growing(const Draft& draft, const Shape& s, const Growth& g)
        : draft(draft), s(s), g(g), most(k + (g.depth - 1) * k * k), frontier(n), next(n), hidden(n * s.width), states(n * s.width),
          embedded(n * s.width), looked(g.future ? s.batch * s.width : 0), ahead(g.future ? n * s.width : 0), cos(n * s.head_dim), sin(n * s.head_dim),
          values(n * k), places(n * k), first_slots(s.batch), order(k * k), reach(n * g.depth * k) {}

    // The children of `rows` rows of each sequence, whose states these are, and the best of them.
    void add_level(int64_t level, const uint16_t* from, int64_t rows) {
        static thread_local std::vector<uint16_t> logits;
        if (logits.size() < size_t(n * known)) logits.resize(n * known);
        const int64_t count = s.batch * rows, first = level == 0 ? 0 : k + (level - 1) * k * k;
        if (g.future) look(level, rows);
        draft_head_bf16(&draft, from, g.future ? ahead.data() : nullptr, logits.data(), count, s.width, s.eps);
        best_bf16(logits.data(), values.data(), places.data(), count, known, k);
        for (int64_t b = 0; b < s.batch; b++) {
            int64_t* tokens = g.tokens + b * most + first;
            int64_t* parents = g.parents + b * most + first;
            float* scores = g.scores + b * most + first;
            for (int64_t i = 0; i < rows * k; i++) {
                const int64_t row = b * k + i / k, found = b * rows * k + i;
                tokens[i] = draft.target_ids[places[found]];
                parents[i] = level == 0 ? -1 : frontier.candidate[row];
                scores[i] = (level == 0 ? 0 : frontier.scores[row]) + values[found];
            }
            std::iota(order.begin(), order.begin() + rows * k, 0);
            std::partial_sort(order.begin(), order.begin() + k, order.begin() + rows * k, [&](int64_t i, int64_t j) {
                return scores[i] > scores[j] || (scores[i] == scores[j] && i < j);
            });
            for (int64_t i = 0; i < k; i++) {
                const int64_t at = order[i], to = b * k + i;
                next.tokens[to] = tokens[at], next.scores[to] = scores[at];
                next.origin[to] = at / k, next.candidate[to] = first + at;
            }
        }
        std::swap(frontier, next);
    }

    // What f says of a level, for each of its rows: W_j f. The j of most sequences are the same, and only those of levels that are
    // grown are read.
    void look(int64_t level, int64_t rows) {
        std::vector<uint8_t> done(s.batch);
        for (int64_t b = 0; b < s.batch; b++) {
            if (done[b]) continue;
            const int64_t step = g.steps[b * g.depth + level], first = step * s.width;
            const Product& all = draft.looks;
            tile_product(g.future, all.weight + first * all.inputs * all.bits / 8, all.scales ? all.scales + first : nullptr, nullptr,
                         looked.data(), s.batch, all.inputs, s.width, all.bits, all.rounds_rows);
            for (int64_t c = b; c < s.batch; c++) {
                if (g.steps[c * g.depth + level] != step) continue;
                done[c] = 1;
                for (int64_t i = c * rows; i < (c + 1) * rows; i++)
                    std::memcpy(&ahead[i * s.width], &looked[c * s.width], s.width * 2);
            }
        }
    }

    bool deeper() const {
        float promised = 0;
        for (float score : frontier.scores) promised += std::exp(score);
        return promised > g.least;
    }

    // The frontier through the draft's layer; `rows` of each sequence are in the level above it, whose states these are.
    const uint16_t* step(int64_t level, const uint16_t* above, int64_t rows, const Place& from) {
        const int64_t soft = g.with_soft ? g.num_soft : 0, longest = *std::max_element(g.lengths, g.lengths + s.batch);
        Shape shape = s;
        shape.num_keys = soft + longest + (level + 1) * k, shape.lead = soft;
        mask.assign(n * shape.num_keys, 0);
        const std::vector<uint8_t> before = reach;  // [batch, k, depth, k]
        for (int64_t i = 0; i < n; i++) {
            const int64_t b = i / k, parent = b * rows + frontier.origin[i];
            std::memcpy(&embedded[i * s.width], g.embeddings + frontier.tokens[i] * s.width, s.width * 2);
            std::memcpy(&hidden[i * s.width], above + parent * s.width, s.width * 2);
            std::memcpy(&cos[i * s.head_dim], from.cos + (b * g.depth + level) * s.head_dim, s.head_dim * 2);
            std::memcpy(&sin[i * s.head_dim], from.sin + (b * g.depth + level) * s.head_dim, s.head_dim * 2);
            uint8_t *mine = &reach[i * g.depth * k], *sees = &mask[i * shape.num_keys];
            if (level > 0) std::memcpy(mine, &before[parent * g.depth * k], level * k);
            std::memset(mine + level * k, 0, k);
            mine[level * k + i % k] = 1;
            std::memset(sees, 1, soft + g.lengths[b]);
            std::memcpy(sees + soft + g.lengths[b], mine, (level + 1) * k);
            first_slots[b] = g.num_soft + g.lengths[b] + level * k;
        }
        const int64_t skipped = (g.num_soft - soft) * s.head_dim;
        const Place place = {cos.data(), sin.data(), mask.data(), from.keys, from.values, from.keys + skipped, from.values + skipped,
                             first_slots.data()};
        draft_layer_bf16(&draft, &shape, &place, embedded.data(), hidden.data(), states.data());
        return states.data();
    }
};

}  // namespace

// Of `place` cos and sin [batch, depth, head_dim] of the levels, and keys and values; shape->rows children of a node are
// candidates. Returns how many levels there are now.
extern "C" int64_t grow_bf16(const Draft* draft, const Shape* shape, const Place* place, const Growth* growth) {
    Growing growing(*draft, *shape, *growth);
    const uint16_t* states = growth->out;
    growing.add_level(0, states, 1);
    int64_t level = 1;
    for (int64_t rows = 1; level < growth->depth && growing.deeper(); level++, rows = shape->rows) {
        states = growing.step(level - 1, states, rows, *place);
        growing.add_level(level, states, shape->rows);
    }
    return level;
}
