// A block of GPU threads on one CPU thread: every thread a fiber that runs until it waits. Finds
// what a GPU would not tell: threads that wait for each other in vain, threads at different
// barriers, lanes that a mask leaves out.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "global_memory.h"
#include "ordering.h"
#include "shared_memory.h"

namespace winnow::host {

// What a checker found. The text names the kernel, the block and the thread.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a kernel waits. Two waits are the same one if they stand on the same line.
struct Site {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxExchange = 64;
constexpr int64_t kBlocksAtOnce = 7;

// Lanes of one warp that meet: each brings a value, and all go on once the last one has come.
struct Meeting {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  uint32_t left = 0;
  bool orders_memory = false;
  Site site;
  unsigned char values[kLanes][kMaxExchange];
};

enum class Order { kForward, kReverse, kShuffled };

class Block {
 public:
  // The one whose thread runs now.
  static Block& current();

  int thread() const { return running_; }
  int64_t index_x() const { return x_; }
  int64_t index_y() const { return y_; }
  SharedMemory& shared() { return shared_; }
  // What is wrong with an access to global memory; see GlobalMemory::check.
  std::string check_global(Access access, const char* address, size_t bytes, size_t unit) const {
    return GlobalMemory::device().check(access, address, bytes, unit,
                                        {number_, meetings_, running_, &ordering_});
  }

  // Every thread must come, and to the same line. Says whether any of them brought a flag.
  bool barrier(Site site, bool flag = false);
  // As `barrier`, for `blocks` blocks, each of which adds one to the counter.
  void barrier_of_blocks(uint32_t* counter, int64_t blocks, Site site);
  // Returns the meeting with everyone's value in it; call leave() when they have been read.
  Meeting& meet(uint32_t mask, const void* value, size_t bytes, Site site, bool orders_memory);
  void leave(Meeting& meeting);

  [[noreturn]] void fault(const std::string& what) const;

  // Runs a whole grid; throws Fault.
  void run(const char* kernel, int64_t grid_x, int64_t grid_y, int64_t shared_bytes, int threads,
           const std::function<void()>& body);
  // The same with all blocks alive at once: they take turns where they wait for each other.
  void run_together(const char* kernel, int64_t grid_x, int64_t grid_y, int threads,
                    const std::function<void()>& body);

  Order order = Order::kForward;
  int64_t launches = 0;

 private:
  enum class State { kReady, kAtBarrier, kAtBlocks, kInMeeting, kDone };
  struct Thread {
    State state;
    Site site;
    Meeting* meeting;
  };

  static void thread_main(void*);
  void prepare(const char* kernel, int64_t shared_bytes, int threads,
               const std::function<void()>& body);
  void start_block(int64_t x, int64_t y);
  // Until all threads have returned or all wait for other blocks.
  void advance();
  bool done() const;
  bool waits() const { return counter_ != nullptr && *counter_ < goal_; }
  bool at_barrier_of_blocks() const;
  void release_barrier();
  [[noreturn]] void explain_standstill() const;
  std::string where(int thread) const;

  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  int64_t x_ = 0;
  int64_t y_ = 0;
  int count_ = 0;
  int running_ = 0;
  int64_t shared_bytes_ = 0;
  uint32_t number_ = 0;          // in GlobalMemory
  uint32_t meetings_ = 0;        // with other blocks
  uint32_t* counter_ = nullptr;  // where the block waits for others,
  uint32_t goal_ = 0;            // until it has come to this
  int64_t blocks_ = 0;
  std::mt19937 shuffler_;
  bool any_flag_ = false;   // of the threads that have come to the barrier
  bool all_flags_ = false;  // of the barrier that was released last
  std::string failure_;
  Ordering ordering_;
  SharedMemory shared_{ordering_};
  std::vector<Thread> state_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::vector<std::unique_ptr<Meeting>>> open_;  // per warp
  std::vector<std::unique_ptr<Meeting>> spare_;
  std::vector<std::unique_ptr<Block>> mates_;  // of run_together
};

}  // namespace winnow::host
