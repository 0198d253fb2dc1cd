// Which accesses of a block's threads come after one another: a barrier orders all of them, and
// warp_sync the lanes that meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace winnow::host {

enum class Access { kRead, kWrite, kAtomic };

class Ordering {
 public:
  void start_block(int threads);
  void order_all() { barrier_ = ++now_; }
  void order_lanes(int warp, uint32_t mask);

  // Of what happens now; 0 is before everything.
  uint32_t now() const { return now_; }
  // Whether what thread `earlier` did at `time` comes before what `thread` does now.
  bool ordered(uint32_t time, int earlier, int thread) const {
    return time < barrier_ || earlier == thread || met_since(time, earlier, thread);
  }

 private:
  bool met_since(uint32_t time, int earlier, int thread) const;

  uint32_t now_ = 1;
  uint32_t barrier_ = 1;
  std::vector<uint32_t> lanes_;  // [warp][lane][lane]: when the two last met
};

}  // namespace winnow::host
