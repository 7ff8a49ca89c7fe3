// A roster whose rows a device steps and counts: what changes from step to step, as words of a table.
#pragma once

#include <vector>

#include "host/roster.h"

namespace fusedopt::host {

class DeviceTable {
 public:
  // See Roster.
  DeviceTable(py::object param_groups, const py::list& groups, py::object state,
              const std::vector<std::size_t>& members, const std::vector<std::size_t>& new_state,
              const std::vector<std::size_t>& new_average);

  // True when all is as it was planned and a step can run; false when the tables must be made anew.
  bool scan(int threads);
  // See Roster.
  void check(int threads) { roster_.check(threads); }

  // Writes the gradients' words and the groups' records, see core/device_tables.h. `words`: a one-dimensional int64
  // tensor on the CPU. Returns whether anything changed.
  bool write(const py::handle& words) const;

  // What has a gradient was stepped: its states are new no more.
  void commit();
  void release() { roster_.release(); }
  void rebind(py::object param_groups) { roster_.rebind(std::move(param_groups)); }
  const Roster& roster() const { return roster_; }

 private:
  bool has_planned_strides(std::size_t i) const;

  Roster roster_;
};

}  // namespace fusedopt::host
