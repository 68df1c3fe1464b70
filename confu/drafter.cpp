// What drafter.py does in torch, for a draft whose weights lie in tiles and few bfloat16 rows: reading accepted tokens in one call,
// the candidates of trees, level by level, in another.

#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// What a draft's cache holds of each sequence, before which come its soft slots, and the embeddings of all tokens.
struct Held {
    int64_t num_soft, with_soft;
    const uint16_t* embeddings;
    const int64_t* lengths;
};

// Accepted tokens and what follows the last of each sequence, rows of which only `counts` are real; the target's states for them,
// and f of each, or none -> the last real row's state, and what W_j reads of its f.
struct Path {
    Held held;
    const int64_t *tokens, *next_tokens, *counts;  // [batch, rows], [batch], [batch]
    const uint16_t *features, *future;             // [batch, rows, inputs of fc], [batch, rows, 4 width]
    uint16_t *out, *looked_at;                     // [batch, width], [batch, 3 width]
};

// What trees grow from, and where their candidates go: [batch, candidates], those of level 1 first.
struct Growth {
    Held held;
    int64_t depth, most_steps;
    const uint16_t *out, *looked_at;  // [batch, width]; [batch, inputs of W_j], or none
    const int64_t* lag;               // from f's anchor to the root row, in rows: says, with the level, which W_j [batch]
    int64_t *tokens, *parents;
    float *scores, least;  // that a frontier has to promise for a level below it
};

// Rows through the draft's layer, as many of each sequence, behind what the cache holds and `behind` rows that were there before.
class Entering {
    const Draft& draft;
    const Held& held;
    const Place& from;
    Shape s;
    std::vector<uint16_t> embedded, hidden, cos, sin;
    std::vector<uint8_t> mask;
    std::vector<int64_t> first_slots;

public:
    Entering(const Draft& draft, const Held& held, const Place& from, const Shape& shape)
        : draft(draft), held(held), from(from), s(shape), embedded(n() * s.width), hidden(n() * s.width), cos(n() * s.head_dim),
          sin(n() * s.head_dim), first_slots(s.batch) {}

    int64_t n() const { return s.batch * s.rows; }

    void open(int64_t behind) {
        s.lead = held.with_soft ? held.num_soft : 0;
        s.num_keys = s.lead + *std::max_element(held.lengths, held.lengths + s.batch) + behind + s.rows;
        mask.assign(n() * s.num_keys, 0);
        for (int64_t b = 0; b < s.batch; b++) first_slots[b] = held.num_soft + held.lengths[b] + behind;
    }

    // Row i of a token, so many positions behind what is held, that adds to `state`. It sees what is held; returned is what it sees
    // of the rows behind that.
    uint8_t* enter(int64_t i, int64_t token, int64_t position, const uint16_t* state) {
        const int64_t length = held.lengths[i / s.rows], turn = (length + position) * s.head_dim;
        std::memcpy(&embedded[i * s.width], held.embeddings + token * s.width, s.width * 2);
        std::memcpy(&hidden[i * s.width], state, s.width * 2);
        std::memcpy(&cos[i * s.head_dim], from.cos + turn, s.head_dim * 2);
        std::memcpy(&sin[i * s.head_dim], from.sin + turn, s.head_dim * 2);
        uint8_t* sees = &mask[i * s.num_keys];
        std::memset(sees, 1, s.lead + length);
        return sees + s.lead + length;
    }

    void run(uint16_t* out) const {
        const int64_t skipped = (held.num_soft - s.lead) * s.head_dim;
        const Place place = {cos.data(), sin.data(), mask.data(), from.keys, from.values, from.keys + skipped, from.values + skipped,
                             first_slots.data()};
        draft_layer_bf16(&draft, &s, &place, embedded.data(), hidden.data(), out);
    }
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
    Entering entering;
    std::vector<uint16_t> states, looked, ahead;
    std::vector<float> values;
    std::vector<int64_t> places, order;
    std::vector<uint8_t> reach;

public:
    Growing(const Draft& draft, const Shape& s, const Place& from, const Growth& g)
        : draft(draft), s(s), g(g), most(k + (g.depth - 1) * k * k), frontier(n), next(n), entering(draft, g.held, from, s),
          states(n * s.width), looked(g.looked_at ? s.batch * s.width : 0), ahead(g.looked_at ? n * s.width : 0), values(n * k),
          places(n * k), order(k * k), reach(n * g.depth * k) {}

    // The children of `rows` rows of each sequence, whose states these are, and the best of them.
    void add_level(int64_t level, const uint16_t* from, int64_t rows) {
        static thread_local std::vector<uint16_t> logits;
        if (logits.size() < size_t(n * known)) logits.resize(n * known);
        const int64_t count = s.batch * rows, first = level == 0 ? 0 : k + (level - 1) * k * k;
        if (g.looked_at) look(level, rows);
        draft_head_bf16(&draft, from, g.looked_at ? ahead.data() : nullptr, logits.data(), count, s.width, s.eps);
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
        const auto step_of = [&](int64_t b) { return std::min(g.lag[b] + level, g.most_steps); };
        for (int64_t b = 0; b < s.batch; b++) {
            if (done[b]) continue;
            const int64_t step = step_of(b), first = step * s.width;
            const Product& all = draft.looks;
            tile_product(g.looked_at, all.weight + first * all.inputs * all.bits / 8, all.scales ? all.scales + first : nullptr, nullptr,
                         looked.data(), s.batch, all.inputs, s.width, all.bits, all.rounds_rows);
            for (int64_t c = b; c < s.batch; c++) {
                if (step_of(c) != step) continue;
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
    const uint16_t* step(int64_t level, const uint16_t* above, int64_t rows) {
        entering.open(level * k);
        const std::vector<uint8_t> before = reach;  // [batch, k, depth, k]
        for (int64_t i = 0; i < n; i++) {
            const int64_t parent = i / k * rows + frontier.origin[i];
            uint8_t* mine = &reach[i * g.depth * k];
            if (level > 0) std::memcpy(mine, &before[parent * g.depth * k], level * k);
            std::memset(mine + level * k, 0, k);
            mine[level * k + i % k] = 1;
            std::memcpy(entering.enter(i, frontier.tokens[i], level, above + parent * s.width), mine, (level + 1) * k);
        }
        entering.run(states.data());
        return states.data();
    }
};

}  // namespace

// Of `place` the tables of cos and sin [positions, head_dim], and keys and values, here and below.
extern "C" void commit_bf16(const Draft* draft, const Shape* shape, const Place* place, const Path* path) {
    const Shape& s = *shape;
    const Product& fc = draft->fc;
    const int64_t n = s.batch * s.rows, wide = 3 * s.width;
    Entering entering(*draft, path->held, *place, s);
    std::vector<uint16_t> fused(n * s.width), states(n * s.width);
    tile_product(path->features, fc.weight, fc.scales, fc.bias, fused.data(), n, fc.inputs, fc.outputs, fc.bits, fc.rounds_rows);
    entering.open(0);
    for (int64_t i = 0; i < n; i++) {
        const int64_t b = i / s.rows, row = i % s.rows, last = std::max<int64_t>(0, path->counts[b] - 1);
        const int64_t token = row < last ? path->tokens[i + 1] : path->next_tokens[b];
        std::memset(entering.enter(i, token, row, &fused[i * s.width]), 1, last + 1);
    }
    entering.run(states.data());
    for (int64_t b = 0; b < s.batch; b++) {
        const int64_t last = b * s.rows + std::max<int64_t>(0, path->counts[b] - 1);
        std::memcpy(path->out + b * s.width, &states[last * s.width], s.width * 2);
        if (path->future)  // all states of f but the first
            share_add_norm_bf16(path->future + last * 4 * s.width + s.width, nullptr, draft->ones, nullptr, path->looked_at + b * wide, 3,
                                s.width, s.eps);
    }
}

// shape->rows children of a node are candidates. Returns how many levels there are now.
extern "C" int64_t grow_bf16(const Draft* draft, const Shape* shape, const Place* place, const Growth* growth) {
    Growing growing(*draft, *shape, *place, *growth);
    const uint16_t* states = growth->out;
    growing.add_level(0, states, 1);
    int64_t level = 1;
    for (int64_t rows = 1; level < growth->depth && growing.deeper(); level++, rows = shape->rows) {
        states = growing.step(level - 1, states, rows);
        growing.add_level(level, states, shape->rows);
    }
    return level;
}
