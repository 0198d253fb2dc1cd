#include "kvcache/prefix_index.h"

#include <algorithm>
#include <utility>

namespace winnow {
namespace {

uint64_t mix(uint64_t hash, uint64_t value) {
  // The finaliser of splitmix64 over a running sum.
  uint64_t z = hash + value + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

uint64_t place_of(int32_t parent, const int64_t* tokens, int64_t count) {
  uint64_t hash = mix(0, static_cast<uint64_t>(static_cast<int64_t>(parent)));
  for (int64_t t = 0; t < count; ++t) hash = mix(hash, static_cast<uint64_t>(tokens[t]));
  return hash;
}

}  // namespace

bool PrefixIndex::holds(int32_t block, int32_t parent, const int64_t* tokens, int64_t count) const {
  const Node& node = nodes_.at(block);
  return node.parent == parent && static_cast<int64_t>(node.tokens.size()) == count &&
         std::equal(node.tokens.begin(), node.tokens.end(), tokens);
}

int32_t PrefixIndex::find(int32_t parent, const int64_t* tokens, int64_t count) const {
  const auto [first, last] = places_.equal_range(place_of(parent, tokens, count));
  for (auto place = first; place != last; ++place) {
    if (holds(place->second, parent, tokens, count)) return place->second;
  }
  return kNone;
}

void PrefixIndex::add(int32_t block, int32_t parent, const int64_t* tokens, int64_t count) {
  std::vector<int32_t>* siblings = parent == kNone ? nullptr : &nodes_.at(parent).children;
  if (siblings && siblings->size() == siblings->capacity()) {
    siblings->reserve(2 * siblings->size() + 1);  // the last step must not fail
  }
  const auto place = places_.emplace(place_of(parent, tokens, count), block);
  try {
    by_use_.emplace(++clock_, block);
    nodes_.emplace(block, Node{parent, {tokens, tokens + count}, {}, clock_});
  } catch (...) {
    by_use_.erase(clock_);
    places_.erase(place);
    throw;
  }
  if (siblings) siblings->push_back(block);
}

void PrefixIndex::erase(int32_t block) {
  const Node& node = nodes_.at(block);
  if (node.parent != kNone) {
    std::vector<int32_t>& siblings = nodes_.at(node.parent).children;
    // remove() comes from the last child, so this ends at once there.
    siblings.erase(std::find(siblings.rbegin(), siblings.rend(), block).base() - 1);
  }
  const int64_t count = static_cast<int64_t>(node.tokens.size());
  auto place = places_.find(place_of(node.parent, node.tokens.data(), count));
  while (place->second != block) ++place;
  places_.erase(place);
  by_use_.erase(node.used);
  nodes_.erase(block);
}

void PrefixIndex::touch(const std::vector<int32_t>& chain) {
  for (auto block = chain.rbegin(); block != chain.rend(); ++block) {
    Node& node = nodes_.at(*block);
    auto use = by_use_.extract(node.used);  // moves the entry: nothing is allocated
    node.used = use.key() = ++clock_;
    by_use_.insert(std::move(use));
  }
}

}  // namespace winnow
