#include "global_memory.h"

#include <algorithm>

namespace winnow::host {
namespace {

constexpr size_t kPage = 1024;
constexpr size_t kMostPages = 1 << 15;  // remembered from one launch to the next
constexpr int kWarpLanes = 32;

}  // namespace

GlobalMemory& GlobalMemory::device() {
  static GlobalMemory memory;
  return memory;
}

void GlobalMemory::start_launch(int64_t blocks_x, int64_t blocks_y) {
  if (pages_.size() > kMostPages) {
    pages_.clear();
    recent_.fill({});
  }
  blocks_x_ = blocks_x;
  first_ = end_;
  end_ = first_ + static_cast<uint32_t>(blocks_x * blocks_y);
  teams_.assign(end_ - first_, nullptr);
}

GlobalMemory::Page& GlobalMemory::page_of(uintptr_t number, size_t unit) {
  Recent& recent = recent_[number % recent_.size()];
  if (recent.page == nullptr || recent.number != number) {
    auto found = pages_.find(number);
    if (found == pages_.end()) {
      found = pages_.emplace(number, Page{unit, std::vector<Cell>(kPage / unit)}).first;
    }
    recent = {number, &found->second};
  }
  Page& page = *recent.page;
  if (page.unit > unit) {  // shared by elements of several sizes
    std::vector<Cell> finer(kPage / unit);
    for (size_t i = 0; i < finer.size(); ++i) finer[i] = page.cells[i * unit / page.unit];
    page = {unit, std::move(finer)};
  }
  return page;
}

bool GlobalMemory::ordered(const Use& earlier, const Moment& now) const {
  if (earlier.block < first_) return true;
  if (earlier.block == now.block) {
    return now.ordering->ordered(earlier.time, earlier.thread, now.thread);
  }
  return earlier.meetings < now.meetings &&
         teams_[earlier.block - first_] == teams_[now.block - first_];
}

const GlobalMemory::Use* GlobalMemory::collide(Access access, const Moment& now, Cell* cell) const {
  const bool atomic = access == Access::kAtomic;
  if (!(atomic && cell->write.atomic)) {
    if (!ordered(cell->write, now)) return &cell->write;
    if (!atomic && !ordered(cell->atomic, now)) return &cell->atomic;
  }
  const Use use = {now.block, now.meetings, now.ordering->now(), static_cast<int16_t>(now.thread),
                   atomic};
  if (access != Access::kRead) {
    for (const Use* read : {&cell->read, &cell->read_other_warp, &cell->read_other_block}) {
      if (!ordered(*read, now)) return read;
    }
    const bool same = cell->write.block == now.block && cell->write.thread == now.thread;
    if (cell->write.atomic && !same) cell->atomic = cell->write;
    cell->write = use;
    return nullptr;
  }
  if (cell->read.block != now.block) {
    cell->read_other_block = cell->read;
  } else if (cell->read.thread / kWarpLanes != now.thread / kWarpLanes) {
    cell->read_other_warp = cell->read;
  }
  cell->read = use;
  return nullptr;
}

std::string GlobalMemory::who(const Use& use, const Moment& now) const {
  if (use.block == now.block) return "thread " + std::to_string(use.thread);
  const int64_t place = use.block - first_;
  return "block (" + std::to_string(place % blocks_x_) + ", " + std::to_string(place / blocks_x_) +
         ")";
}

std::string GlobalMemory::check(Access access, const char* address, size_t bytes, size_t unit,
                                const Moment& now) {
  auto at = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = at + bytes;
  while (at < end) {
    Page& page = page_of(at / kPage, unit);
    const uintptr_t stop = std::min(end, (at / kPage + 1) * kPage);
    for (size_t i = at % kPage / page.unit; at < stop; ++i, at += page.unit) {
      Cell& cell = page.cells[i];
      const Use* other = collide(access, now, &cell);
      if (other == nullptr) continue;
      const bool written = other == &cell.write || other == &cell.atomic;
      return std::string(access == Access::kRead ? "reads" : "writes") + " global memory that " +
             who(*other, now) + (written ? " writes" : " reads") + ", and nothing orders the two";
    }
  }
  return {};
}

}  // namespace winnow::host
