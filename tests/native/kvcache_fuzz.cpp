// A libFuzzer target: bytes become operations on tables that share a pool, each checked against the
// model. `make fuzz` compiles it with sanitizers and runs it.
#include "kvcache_world.h"

namespace winnow::model {
namespace {

// Each choice takes one byte, or as many as its range needs; behind the last byte all are the
// lowest.
class Bytes : public Choices {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  bool left() const { return at_ < end_; }
  int64_t roll(int64_t low, int64_t high) override {
    const uint64_t choices = static_cast<uint64_t>(high - low) + 1;
    uint64_t value = 0;
    for (uint64_t range = choices - 1; range > 0; range >>= 8) {
      value = value << 8 | (left() ? *at_++ : 0);
    }
    return low + static_cast<int64_t>(value % choices);
  }

 private:
  const uint8_t* at_;
  const uint8_t* const end_;
};

}  // namespace
}  // namespace winnow::model

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace winnow::model;
  Bytes bytes(data, size);
  Pages pages(bytes.roll(0, 24));
  {
    World world(pages, bytes, true);
    while (bytes.left()) world.step();
    world.check();
  }
  check_returned(pages);
  return 0;
}
