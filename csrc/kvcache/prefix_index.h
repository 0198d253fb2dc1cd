// Which full blocks hold which tokens after which prefix: a chain of blocks, each found by a hash
// of its tokens and its predecessor, and recognised by comparing both. A block has one place at
// most, so it names its own node.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace winnow {

class PrefixIndex {
 public:
  static constexpr int32_t kNone = -1;  // the predecessor of a first block; no block found

  // The block that follows `parent` with these tokens.
  int32_t find(int32_t parent, const int64_t* tokens, int64_t count) const;
  bool has(int32_t block) const { return nodes_.count(block) > 0; }
  // `block` must have no place yet, `parent` one (or be kNone).
  void add(int32_t block, int32_t parent, const int64_t* tokens, int64_t count);
  // Takes `block` and all that follow it out, the last ones first, and hands each to `gone`.
  // Allocates nothing, so it cannot stop halfway.
  template <typename Gone>
  void remove(int32_t block, const Gone& gone) {
    for (int32_t at = block;;) {
      const Node& node = nodes_.at(at);
      if (!node.children.empty()) {
        at = node.children.back();
        continue;
      }
      const int32_t parent = node.parent;
      erase(at);
      gone(at);
      if (at == block) return;
      at = parent;
    }
  }
  // Marks a chain as used now; its end is forgotten before its beginning.
  void touch(const std::vector<int32_t>& chain);
  // All blocks by their last use, the oldest first.
  const std::map<uint64_t, int32_t>& by_use() const { return by_use_; }

 private:
  struct Node {
    int32_t parent;
    std::vector<int64_t> tokens;
    std::vector<int32_t> children;
    uint64_t used;
  };

  bool holds(int32_t block, int32_t parent, const int64_t* tokens, int64_t count) const;
  void erase(int32_t block);  // one that nothing follows

  std::unordered_map<int32_t, Node> nodes_;
  std::unordered_multimap<uint64_t, int32_t> places_;
  std::map<uint64_t, int32_t> by_use_;
  uint64_t clock_ = 0;
};

}  // namespace winnow
