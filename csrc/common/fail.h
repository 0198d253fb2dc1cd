// Errors of arguments, without torch: what throws reaches Python as a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace winnow {

template <typename... Args>
[[noreturn]] inline void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::invalid_argument(text.str());
}

}  // namespace winnow
