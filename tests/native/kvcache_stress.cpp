// Random operations on tables that share a pool, checked against a model; compiled with sanitizers
// and run by test_kvcache_stress.py.
//
//   kvcache_stress fuzz OPERATIONS SEED     one thread: every effect and every refusal is
//   predicted,
//                                           and allocations fail at any point of some operations
//   kvcache_stress threads OPERATIONS SEED  four threads, caches of their own, one pool
#include <random>
#include <string>
#include <thread>

#include "kvcache_world.h"

namespace winnow::model {
namespace {

class Dice : public Choices {
 public:
  explicit Dice(uint64_t seed) : engine_(seed) {}
  int64_t roll(int64_t low, int64_t high) override {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }

 private:
  std::mt19937_64 engine_;
};

void fuzz(int64_t operations, uint64_t seed) {
  Pages pages(24);
  Dice dice(seed);
  {
    World world(pages, dice, true);
    for (int64_t i = 0; i < operations; ++i) {
      world.step();
      if (i % 64 == 0) world.check();  // what an operation on one cache did to the others
    }
  }
  check_returned(pages);
}

void stress(int64_t operations, uint64_t seed) {
  constexpr uint64_t kThreads = 4;
  Pages pages(kMostBlocks);
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Dice dice(seed * kThreads + t);
      World world(pages, dice, false);
      for (int64_t i = 0; i < operations; ++i) {
        world.step();
        if (i % 16 == 0) world.check();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check_returned(pages);
}

}  // namespace
}  // namespace winnow::model

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int64_t operations = std::stoll(argv[2]);
  const uint64_t seed = std::stoull(argv[3]);
  if (std::string(argv[1]) == "fuzz") winnow::model::fuzz(operations, seed);
  if (std::string(argv[1]) == "threads") winnow::model::stress(operations, seed);
  std::printf("%s: %lld operations\n", argv[1], static_cast<long long>(operations));
  return 0;
}
