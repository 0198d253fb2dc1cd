#include "block.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <sstream>

namespace winnow::host {

namespace {
Block* taking_its_turn = nullptr;  // of those that run together
}

Block& Block::current() {
  static Block block;  // the interpreter's lock keeps launches apart
  return taking_its_turn != nullptr ? *taking_its_turn : block;
}

void Block::fault(const std::string& what) const {
  throw Fault(std::string(kernel_) + ": " + where(running_) + ": " + what);
}

std::string Block::where(int thread) const {
  std::ostringstream text;
  text << "block (" << x_ << ", " << y_ << "), thread " << thread;
  return text.str();
}

void Block::thread_main(void* argument) {
  auto* block = static_cast<Block*>(argument);
  const int self = block->running_;
  try {
    (*block->body_)();
    if (block->shared_.copies_in_flight(self)) {
      block->fault("returns while asynchronous copies are under way");
    }
  } catch (const std::exception& error) {
    if (block->failure_.empty()) block->failure_ = error.what();
  }
  block->state_[static_cast<size_t>(self)].state = State::kDone;
  block->fibers_[static_cast<size_t>(self)]->suspend();
}

bool Block::barrier(Site site, bool flag) {
  Thread& self = state_[static_cast<size_t>(running_)];
  self.state = State::kAtBarrier;
  self.site = site;
  any_flag_ = any_flag_ || flag;
  fibers_[static_cast<size_t>(running_)]->suspend();
  return all_flags_;
}

void Block::barrier_of_blocks(uint32_t* counter, int64_t blocks, Site site) {
  Thread& self = state_[static_cast<size_t>(running_)];
  self.state = State::kAtBlocks;
  self.site = site;
  counter_ = counter;
  blocks_ = blocks;
  fibers_[static_cast<size_t>(running_)]->suspend();
}

// Only where all threads wait: a thread that has returned while others wait is a divergence too,
// because older GPUs hang there.
void Block::release_barrier() {
  for (const Thread& thread : state_) {
    if (thread.state != State::kAtBarrier || !(thread.site == state_[0].site)) explain_standstill();
  }
  ordering_.order_all();
  all_flags_ = any_flag_;
  any_flag_ = false;
  for (Thread& thread : state_) thread.state = State::kReady;
}

Meeting& Block::meet(uint32_t mask, const void* value, size_t bytes, Site site,
                     bool orders_memory) {
  if (bytes > kMaxExchange) fault("a warp exchange of more than 64 bytes a lane");
  const auto warp = static_cast<size_t>(running_ / kLanes);
  const int lane = running_ % kLanes;
  const uint32_t bit = 1u << lane;
  std::ostringstream about;
  about << "warp operation at " << site.file << ":" << site.line << " with mask 0x" << std::hex
        << mask;
  if ((mask & bit) == 0) fault(about.str() + ": the mask leaves out the calling lane");
  auto& open = open_[warp];
  auto found = std::find_if(open.begin(), open.end(), [&](const auto& meeting) {
    return meeting->mask == mask && meeting->site == site && (meeting->arrived & bit) == 0 &&
           meeting->arrived != meeting->mask;
  });
  if (found == open.end()) {
    if (spare_.empty()) spare_.push_back(std::make_unique<Meeting>());
    open.push_back(std::move(spare_.back()));
    spare_.pop_back();
    found = open.end() - 1;
    (*found)->mask = mask;
    (*found)->arrived = (*found)->left = 0;
    (*found)->site = site;
    (*found)->orders_memory = orders_memory;
  }
  Meeting& meeting = **found;
  std::memcpy(meeting.values[lane], value, bytes);
  meeting.arrived |= bit;
  if (meeting.arrived == mask) {
    if (orders_memory) ordering_.order_lanes(static_cast<int>(warp), mask);
    for (int other = 0; other < kLanes; ++other) {
      const auto thread = warp * kLanes + static_cast<size_t>(other);
      if ((mask >> other & 1) != 0 && other != lane) state_[thread].state = State::kReady;
    }
  } else {
    Thread& self = state_[static_cast<size_t>(running_)];
    self.state = State::kInMeeting;
    self.site = site;
    self.meeting = &meeting;
    fibers_[static_cast<size_t>(running_)]->suspend();
  }
  return meeting;
}

void Block::leave(Meeting& meeting) {
  meeting.left |= 1u << running_ % kLanes;
  if (meeting.left != meeting.mask) return;
  auto& open = open_[static_cast<size_t>(running_ / kLanes)];
  const auto found = std::find_if(
      open.begin(), open.end(), [&](const auto& candidate) { return candidate.get() == &meeting; });
  spare_.push_back(std::move(*found));
  open.erase(found);
}

// Nobody can go on. One line per way of being stuck, with its threads.
void Block::explain_standstill() const {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (int t = 0; t < count_; ++t) {
    const Thread& thread = state_[static_cast<size_t>(t)];
    std::ostringstream text;
    if (thread.state == State::kDone) {
      text << "returned";
    } else if (thread.state == State::kAtBarrier) {
      text << "at the barrier " << thread.site.file << ":" << thread.site.line;
    } else if (thread.state == State::kAtBlocks) {
      text << "at the barrier of blocks " << thread.site.file << ":" << thread.site.line;
    } else {
      text << "in the warp operation " << thread.site.file << ":" << thread.site.line
           << " with mask 0x" << std::hex << thread.meeting->mask << ", where 0x"
           << thread.meeting->arrived << " have come";
    }
    const std::string key = text.str();
    const auto group = std::find_if(groups.begin(), groups.end(),
                                    [&](const auto& entry) { return entry.first == key; });
    if (group == groups.end()) {
      groups.push_back({key, {t}});
    } else {
      group->second.push_back(t);
    }
  }
  std::ostringstream text;
  text << kernel_ << ": block (" << x_ << ", " << y_ << "): threads wait for each other in vain:";
  for (const auto& [what, threads] : groups) {
    text << " " << threads.size() << " (first: " << threads.front() << ") " << what << ";";
  }
  throw Fault(text.str());
}

void Block::prepare(const char* kernel, int64_t shared_bytes, int threads,
                    const std::function<void()>& body) {
  kernel_ = kernel;
  shared_bytes_ = shared_bytes;
  body_ = &body;
  count_ = threads;
  if (threads < 1 || threads > kMaxThreads) {
    throw Fault(std::string(kernel) + ": no GPU launches such a block");
  }
}

void Block::start_block(int64_t x, int64_t y) {
  x_ = x;
  y_ = y;
  state_.assign(static_cast<size_t>(count_), Thread{State::kReady, {}, nullptr});
  open_.clear();
  open_.resize(static_cast<size_t>((count_ + kLanes - 1) / kLanes));
  ordering_.start_block(count_);
  number_ = GlobalMemory::device().number_of(x_, y_);
  meetings_ = 0;
  shared_.start_block(count_, static_cast<size_t>(shared_bytes_));
  failure_.clear();
  any_flag_ = false;
  counter_ = nullptr;
  shuffler_.seed(static_cast<uint32_t>(x_ * 131 + y_ + 1));
  while (fibers_.size() < state_.size()) fibers_.push_back(std::make_unique<Fiber>());
  for (size_t t = 0; t < state_.size(); ++t) fibers_[t]->prepare(&thread_main, this);
}

bool Block::done() const {
  return std::all_of(state_.begin(), state_.end(),
                     [](const Thread& thread) { return thread.state == State::kDone; });
}

bool Block::at_barrier_of_blocks() const {
  return std::all_of(state_.begin(), state_.end(), [&](const Thread& thread) {
    return thread.state == State::kAtBlocks && thread.site == state_[0].site;
  });
}

void Block::advance() {
  if (counter_ != nullptr) {  // the others have come
    counter_ = nullptr;
    ++meetings_;
    ordering_.order_all();
    for (Thread& thread : state_) thread.state = State::kReady;
  }
  std::vector<int> turn(static_cast<size_t>(count_));
  std::iota(turn.begin(), turn.end(), 0);
  if (order == Order::kReverse) std::reverse(turn.begin(), turn.end());
  for (;;) {
    if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), shuffler_);
    bool moved = false;
    for (const int t : turn) {
      if (state_[static_cast<size_t>(t)].state != State::kReady) continue;
      running_ = t;
      moved = true;
      fibers_[static_cast<size_t>(t)]->resume();
      if (!failure_.empty()) throw Fault(failure_);  // the other fibers are abandoned
    }
    if (moved) continue;
    if (done()) return;
    if (at_barrier_of_blocks()) {
      const uint32_t before = (*counter_)++;
      goal_ = static_cast<uint32_t>((before / blocks_ + 1) * blocks_);
      GlobalMemory::device().join(number_, counter_);
      return;
    }
    release_barrier();
  }
}

void Block::run(const char* kernel, int64_t grid_x, int64_t grid_y, int64_t shared_bytes,
                int threads, const std::function<void()>& body) {
  ++launches;
  prepare(kernel, shared_bytes, threads, body);
  GlobalMemory::device().start_launch(grid_x, grid_y);
  for (int64_t i = 0; i < grid_x * grid_y; ++i) {
    const int64_t block = order == Order::kForward ? i : grid_x * grid_y - 1 - i;
    start_block(block % grid_x, block / grid_x);
    advance();
    if (!done()) fault("waits for other blocks, which this launch does not run together");
  }
}

void Block::run_together(const char* kernel, int64_t grid_x, int64_t grid_y, int threads,
                         const std::function<void()>& body) {
  ++launches;
  GlobalMemory::device().start_launch(grid_x, grid_y);
  const int64_t blocks = grid_x * grid_y;
  if (blocks > kBlocksAtOnce) {
    throw Fault(std::string(kernel) + ": more blocks than are on the GPU at once");
  }
  while (static_cast<int64_t>(mates_.size()) < blocks) mates_.push_back(std::make_unique<Block>());
  std::vector<Block*> turn;
  for (int64_t i = 0; i < blocks; ++i) {
    Block& mate = *mates_[static_cast<size_t>(i)];
    mate.order = order;
    mate.prepare(kernel, 0, threads, body);
    mate.start_block(i % grid_x, i / grid_x);
    turn.push_back(&mate);
  }
  if (order == Order::kReverse) std::reverse(turn.begin(), turn.end());
  std::mt19937 shuffler(1);
  struct Restore {
    ~Restore() { taking_its_turn = nullptr; }
  } restore;
  for (;;) {
    if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), shuffler);
    Block* stuck = nullptr;
    bool moved = false;
    for (Block* mate : turn) {
      if (mate->done()) continue;
      if (mate->waits()) {
        stuck = mate;
        continue;
      }
      taking_its_turn = mate;
      mate->advance();
      moved = true;
    }
    if (moved) continue;
    if (stuck == nullptr) return;
    stuck->fault("blocks wait for each other in vain");
  }
}

}  // namespace winnow::host
