// What a round does with its trees, of a dozen nodes each, on a CPU: as torch operations, of which there are some seventy, each
// would take longer than its work. Same results as the torch code in tree.py, verify.py, target.py, generate.py and cache.py, which they are tested
// against.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// Whether a node is one: padding scores minus infinity, for which -ffast-math has no word (nor for what is no number).
inline bool is_node(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    return (bits & 0x7f800000) != 0x7f800000;
}

// Of one tree, whose parents come before their children: the distance of every node from the root, and what it sees.
void see(const int64_t* parents, const float* scores, int64_t nodes, int64_t* depths, uint8_t* ancestors) {
    for (int64_t i = 0; i < nodes; i++) {
        uint8_t* mine = ancestors + i * nodes;
        const bool below = parents[i] < i && is_node(scores[i]);
        if (below)
            std::memcpy(mine, ancestors + parents[i] * nodes, nodes);
        else
            std::memset(mine, 0, nodes);
        mine[i] = 1;
        depths[i] = below ? depths[parents[i]] + 1 : 0;
    }
}

}  // namespace

// parents and scores [batch, nodes] -> depths [batch, nodes], ancestors [batch, nodes, nodes]
extern "C" void see_ancestors(const int64_t* parents, const float* scores, int64_t* depths, uint8_t* ancestors, int64_t batch,
                              int64_t nodes) {
    for (int64_t b = 0; b < batch; b++)
        see(parents + b * nodes, scores + b * nodes, nodes, depths + b * nodes, ancestors + b * nodes * nodes);
}

// The `kept` largest of scores [batch, count], of equal ones the first: where they are, and they themselves, [batch, kept].
extern "C" void best_candidates(const float* scores, int64_t* order, float* best, int64_t batch, int64_t count, int64_t kept) {
    std::vector<int64_t> all(count);
    for (int64_t b = 0; b < batch; b++) {
        const float* mine = scores + b * count;
        std::iota(all.begin(), all.end(), 0);
        std::partial_sort(all.begin(), all.begin() + kept, all.end(),
                          [&](int64_t i, int64_t j) { return mine[i] > mine[j] || (mine[i] == mine[j] && i < j); });
        for (int64_t i = 0; i < kept; i++) order[b * kept + i] = all[i], best[b * kept + i] = mine[all[i]];
    }
}

// Trees of roots [batch] and of the first `nodes` - 1 of the candidates [batch, count] that order [batch, kept] names: `out` holds
// tokens, parents and depths, each [batch, nodes].
extern "C" void plant_trees(const int64_t* tokens, const int64_t* parents, const float* scores, const int64_t* roots,
                            const int64_t* order, int64_t* out, float* out_scores, uint8_t* ancestors, int64_t batch, int64_t count,
                            int64_t kept, int64_t nodes) {
    std::vector<int64_t> chosen(nodes - 1), node_of(count);
    for (int64_t b = 0; b < batch; b++) {
        int64_t* its_tokens = out + b * nodes;
        int64_t *its_parents = its_tokens + batch * nodes, *its_depths = its_parents + batch * nodes;
        float* its_scores = out_scores + b * nodes;
        std::copy_n(order + b * kept, nodes - 1, chosen.begin());
        std::sort(chosen.begin(), chosen.end());
        its_tokens[0] = roots[b], its_parents[0] = 0, its_scores[0] = 0;
        for (int64_t i = 1; i < nodes; i++) {
            const int64_t at = b * count + chosen[i - 1], parent = parents[at];
            its_tokens[i] = tokens[at], its_scores[i] = scores[at];
            its_parents[i] = parent < 0 ? 0 : node_of[parent];
            node_of[chosen[i - 1]] = i;
        }
        see(its_parents, its_scores, nodes, its_depths, ancestors + b * nodes * nodes);
    }
}

// The rows of a verification: the nodes, and behind them a contemplate row for each of the `num_con` nodes of highest score
// (con_nodes [batch, num_con], ascending). positions [batch, nodes + num_con] are no further than `last_position`; mask [batch,
// nodes + num_con, num_soft + longest + nodes + num_con] says who sees whom: soft prompts, what each sequence holds, the rows.
extern "C" void lay_out_rows(const uint8_t* ancestors, const float* scores, const int64_t* depths, const int64_t* lengths,
                             int64_t* con_nodes, int64_t* positions, uint8_t* mask, int64_t batch, int64_t nodes, int64_t num_con,
                             int64_t num_soft, int64_t longest, int64_t last_position) {
    const int64_t rows = nodes + num_con, keys = num_soft + longest + rows;
    std::vector<int64_t> order(nodes);
    for (int64_t b = 0; b < batch; b++, ancestors += nodes * nodes, scores += nodes, depths += nodes) {
        int64_t* its_con = con_nodes + b * num_con;
        if (num_con > 0) {
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
            std::copy_n(order.begin(), num_con, its_con);
            std::sort(its_con, its_con + num_con);
        }
        for (int64_t row = 0; row < rows; row++) {
            const bool is_con = row >= nodes;
            const int64_t node = is_con ? its_con[row - nodes] : row, at = lengths[b] + depths[node];
            const int64_t at_node = std::min(at, last_position);
            positions[b * rows + row] = is_con ? std::min(at_node + 1, last_position) : at_node;
            uint8_t* sees = mask + (b * rows + row) * keys;
            std::memset(sees, 0, keys);
            if (is_con) std::memset(sees, 1, num_soft);
            std::memset(sees + num_soft, 1, lengths[b]);
            std::memcpy(sees + num_soft + lengths[b], ancestors + node * nodes, nodes);
            if (is_con) sees[num_soft + lengths[b] + row] = 1;
        }
    }
}

// Down the drawn tokens of every tree: `numbers` [batch, 4] holds how many nodes are accepted, drafted, and on the best path ahead,
// and the token drawn at the last accepted one; `lines` [batch, 3, width] the accepted nodes before the others, the tokens drawn at
// them, and the tokens ahead.
extern "C" void walk_trees(const int64_t* tokens, const int64_t* parents, const int64_t* depths, const float* scores,
                           const int64_t* drawn, int64_t* numbers, int64_t* lines, int64_t batch, int64_t nodes, int64_t width) {
    std::vector<uint8_t> marked(nodes);
    for (int64_t b = 0; b < batch; b++, tokens += nodes, parents += nodes, depths += nodes, scores += nodes, drawn += nodes) {
        int64_t *path = lines + b * 3 * width, *told = path + width, *ahead = told + width, *counts = numbers + b * 4;
        int64_t accepted = 1, drafted = 0, end = 0;
        std::fill_n(path, 3 * width, 0);
        std::fill(marked.begin(), marked.end(), 0);
        marked[0] = 1;
        for (int64_t i = 1; i < nodes; i++) {
            if (!is_node(scores[i])) continue;
            drafted++;
            if (accepted < width && parents[i] == end && tokens[i] == drawn[end]) {
                told[accepted - 1] = drawn[end];
                path[accepted++] = end = i;
                marked[i] = 1;
            }
        }
        told[accepted - 1] = drawn[end];
        for (int64_t i = 0, at = accepted; i < nodes && at < width; i++)
            if (!marked[i]) path[at++] = i;

        int64_t best = end, long_ahead = 0;
        float most = 0;
        std::fill(marked.begin(), marked.end(), 0);
        marked[end] = 1;
        for (int64_t i = end + 1; i < nodes; i++) {
            if (!is_node(scores[i]) || !marked[parents[i]]) continue;
            marked[i] = 1;
            const float value = float(depths[i]) * 1e4f + scores[i];
            if (best == end || value > most) best = i, most = value;
        }
        for (int64_t i = best; i != end && long_ahead < width; i = parents[i]) long_ahead++;
        for (int64_t i = best, at = long_ahead; i != end && at > 0; i = parents[i]) ahead[--at] = tokens[i];
        counts[0] = accepted, counts[1] = drafted, counts[2] = long_ahead, counts[3] = drawn[end];
    }
}

// Of rows on paths [batch, width], of which the first is contemplated: which row is the nearest contemplated one at or before
// each (anchors), and where that is among con_nodes [batch, num_con].
extern "C" void find_anchors(const int64_t* con_nodes, const int64_t* path, int64_t* anchors, int64_t* places, int64_t batch,
                             int64_t num_con, int64_t width) {
    for (int64_t b = 0; b < batch; b++) {
        int64_t anchor = 0, place = 0;
        for (int64_t m = 0; m < width; m++) {
            const int64_t* found = std::find(con_nodes, con_nodes + num_con, *path++);
            if (found != con_nodes + num_con) anchor = m, place = found - con_nodes;
            *anchors++ = anchor, *places++ = place;
        }
        con_nodes += num_con;
    }
}

// In store [outer, batch, inner, slots, bytes], the rows first[b] + path[b][0], ... (ascending) of each sequence to first[b] on.
extern "C" void keep_rows(char* store, const int64_t* path, const int64_t* first, int64_t outer, int64_t batch, int64_t inner,
                          int64_t slots, int64_t bytes, int64_t count) {
    for (int64_t i = 0; i < outer * batch * inner; i++) {
        const int64_t b = i / inner % batch;
        char* rows = store + (i * slots + first[b]) * bytes;
        for (int64_t m = 0; m < count; m++)
            if (path[b * count + m] != m) std::memcpy(rows + m * bytes, rows + path[b * count + m] * bytes, bytes);
    }
}
