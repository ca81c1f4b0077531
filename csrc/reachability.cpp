// Structure analysis on the curvature graph: who reaches whom, which points meet, and how wide the way out is.
// Nodes are numbered in topological order; edges are given as parallel arrays (input < child).

#include "bindings.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <queue>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

using Ints = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

namespace {

std::vector<std::int64_t> to_vector(const Ints& array) {
    return {array.data(), array.data() + array.size()};
}

void check_edges(const std::vector<std::int64_t>& from, const std::vector<std::int64_t>& to, std::int64_t nodes) {
    if (from.size() != to.size()) throw std::invalid_argument("edge arrays differ in length");
    for (std::size_t e = 0; e < from.size(); ++e)
        if (from[e] < 0 || from[e] >= to[e] || to[e] >= nodes)
            throw std::invalid_argument("edges must go from an earlier to a later node");
}

// Rows of 64-bit words: bit k of row u says that point k reaches node u.
class BitMatrix {
public:
    BitMatrix(std::int64_t rows, std::int64_t bits)
        : words_((bits + 63) / 64), data_(static_cast<std::size_t>(rows * words_), 0) {}

    void set(std::int64_t row, std::int64_t bit) { data_[row * words_ + bit / 64] |= std::uint64_t{1} << (bit % 64); }
    bool get(std::int64_t row, std::int64_t bit) const { return data_[row * words_ + bit / 64] >> (bit % 64) & 1; }
    void merge(std::int64_t into, std::int64_t from) {
        for (std::int64_t w = 0; w < words_; ++w) data_[into * words_ + w] |= data_[from * words_ + w];
    }

private:
    std::int64_t words_;
    std::vector<std::uint64_t> data_;
};

// (nodes × points): 1 where a site of the point reaches the node (sites reach themselves).
Bytes reach(std::int64_t nodes, const Ints& from_array, const Ints& to_array, const Ints& sites, const Ints& points,
            std::int64_t count) {
    const auto from = to_vector(from_array), to = to_vector(to_array);
    check_edges(from, to, nodes);
    BitMatrix bits(nodes, count);
    for (py::ssize_t k = 0; k < sites.size(); ++k) bits.set(sites.data()[k], points.data()[k]);
    std::vector<std::size_t> order(from.size());
    for (std::size_t e = 0; e < order.size(); ++e) order[e] = e;
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return to[a] < to[b]; });
    for (std::size_t e : order) bits.merge(to[e], from[e]);
    Bytes result({nodes, count});
    auto out = result.mutable_unchecked<2>();
    for (std::int64_t u = 0; u < nodes; ++u)
        for (std::int64_t k = 0; k < count; ++k) out(u, k) = bits.get(u, k);
    return result;
}

// (points × points): 1 where some pair of nodes (left, right), which meet in a second derivative, is reached by both.
Bytes meetings(const Bytes& reached, const Ints& left, const Ints& right) {
    const auto r = reached.unchecked<2>();
    const std::int64_t points = r.shape(1);
    Bytes result({points, points});
    auto out = result.mutable_unchecked<2>();
    for (std::int64_t v = 0; v < points; ++v)
        for (std::int64_t w = 0; w < points; ++w) out(v, w) = 0;
    for (py::ssize_t k = 0; k < left.size(); ++k)
        for (std::int64_t v = 0; v < points; ++v) {
            if (!r(left.data()[k], v)) continue;
            for (std::int64_t w = 0; w < points; ++w)
                if (r(right.data()[k], w)) out(v, w) = out(w, v) = 1;
        }
    return result;
}

// Dinic's maximum flow.
class FlowNetwork {
public:
    explicit FlowNetwork(std::int64_t nodes) : arcs_of_(nodes), level_(nodes), next_(nodes) {}

    void add(std::int64_t from, std::int64_t to, std::int64_t capacity) {
        arcs_of_[from].push_back(arcs_.size());
        arcs_.push_back({to, capacity});
        arcs_of_[to].push_back(arcs_.size());
        arcs_.push_back({from, 0});
    }

    std::int64_t max_flow(std::int64_t source, std::int64_t sink) {
        std::int64_t total = 0;
        while (layer(source, sink)) {
            std::fill(next_.begin(), next_.end(), 0);
            while (std::int64_t pushed = augment(source, sink)) total += pushed;
        }
        return total;
    }

private:
    struct Arc {
        std::int64_t to, left;
    };

    bool layer(std::int64_t source, std::int64_t sink) {
        std::fill(level_.begin(), level_.end(), -1);
        level_[source] = 0;
        std::queue<std::int64_t> queue;
        queue.push(source);
        while (!queue.empty()) {
            const auto u = queue.front();
            queue.pop();
            for (auto a : arcs_of_[u])
                if (arcs_[a].left > 0 && level_[arcs_[a].to] < 0) {
                    level_[arcs_[a].to] = level_[u] + 1;
                    queue.push(arcs_[a].to);
                }
        }
        return level_[sink] >= 0;
    }

    // One augmenting path, walked with an explicit stack: graphs may be thousands of nodes deep.
    std::int64_t augment(std::int64_t source, std::int64_t sink) {
        std::vector<std::size_t> path;
        std::int64_t u = source;
        while (u != sink) {
            auto& k = next_[u];
            while (k < arcs_of_[u].size()) {
                const Arc& arc = arcs_[arcs_of_[u][k]];
                if (arc.left > 0 && level_[arc.to] == level_[u] + 1) break;
                ++k;
            }
            if (k < arcs_of_[u].size()) {
                path.push_back(arcs_of_[u][k]);
                u = arcs_[path.back()].to;
            } else if (path.empty()) {
                return 0;
            } else {  // dead end: step back and never come here again in this phase
                u = arcs_[path.back() ^ 1].to;
                path.pop_back();
                ++next_[u];
            }
        }
        std::int64_t pushed = std::numeric_limits<std::int64_t>::max();
        for (auto a : path) pushed = std::min(pushed, arcs_[a].left);
        for (auto a : path) {
            arcs_[a].left -= pushed;
            arcs_[a ^ 1].left += pushed;
        }
        return pushed;
    }

    std::vector<Arc> arcs_;
    std::vector<std::vector<std::size_t>> arcs_of_;
    std::vector<std::int64_t> level_;
    std::vector<std::size_t> next_;
};

// The least total capacity of nodes that meets every path from a site to a sink (ends included).
std::int64_t min_cut(const Ints& from_array, const Ints& to_array, const Ints& capacity, const Ints& sites,
                     const Ints& sinks) {
    const std::int64_t nodes = capacity.size();
    const auto from = to_vector(from_array), to = to_vector(to_array);
    check_edges(from, to, nodes);
    const std::int64_t unlimited = std::numeric_limits<std::int64_t>::max() / 4;
    const std::int64_t source = 2 * nodes, sink = 2 * nodes + 1;
    FlowNetwork network(2 * nodes + 2);
    for (std::int64_t u = 0; u < nodes; ++u) network.add(2 * u, 2 * u + 1, capacity.data()[u]);
    for (std::size_t e = 0; e < from.size(); ++e) network.add(2 * from[e] + 1, 2 * to[e], unlimited);
    for (py::ssize_t k = 0; k < sites.size(); ++k) network.add(source, 2 * sites.data()[k], unlimited);
    for (py::ssize_t k = 0; k < sinks.size(); ++k) network.add(2 * sinks.data()[k] + 1, sink, unlimited);
    return network.max_flow(source, sink);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Structure analysis of curvature graphs (reachability, meetings, node-capacity min-cut), elementwise programs, "
              "transposes.";
    bind_program(m);
    bind_transpose(m);
    m.def("reach", &reach, py::arg("nodes"), py::arg("inputs"), py::arg("children"), py::arg("sites"),
          py::arg("points"), py::arg("count"), "uint8 (nodes, points): who is reached by which point.");
    m.def("meetings", &meetings, py::arg("reached"), py::arg("left"), py::arg("right"),
          "uint8 (points, points): which points meet in one of the node pairs (left, right).");
    m.def("min_cut", &min_cut, py::arg("inputs"), py::arg("children"), py::arg("capacity"), py::arg("sites"),
          py::arg("sinks"), "Least total node capacity that meets every path from sites to sinks.");
}
