// The plan: every tensor of an optimizer that one engine steps, as tables that outlive the step.
//
// `scan` is the host's whole work per step: it reads gradients and hyperparameters, and sees whether
// anything the tables rely on has changed (a parameter or state that moved, a state entry that was
// replaced, a group that was added, a flag that was switched). It writes nothing but the tables.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <string>
#include <vector>

#include "core/job.h"
#include "host/anatomy.h"
#include "host/geometry.h"
#include "host/tensor.h"

namespace fusedopt::host {

namespace py = pybind11;

// A hyperparameter in a group dict: group[key], or group[key][index] when index >= 0.
struct HyperKey {
  py::object key;
  Py_ssize_t index;
  double low, high;  // what it may be, ends included
};

// A hyperparameter that decides which states there are; it must keep its truth value.
struct Switch {
  py::object key;
  bool on;
};

// Where an engine on a device reads hyperparameter k of a group: an address, if it is a tensor there.
// Bit 0 of the address is set when it is a double.
using Sources = std::int64_t[2 + kMaxHyper];

// A kernel of which the host knows only names: a device prepares its coefficients, and counts its steps.
struct NamedKernel {
  std::string rule;
  std::vector<std::string> states, scalars, hyper;
  std::vector<const char*> pointers;
  Kernel kernel;
  NamedKernel(std::string rule, std::vector<std::string> states, std::vector<std::string> scalars,
              std::vector<std::string> hyper);
};

// g itself, or what it stands for when it is lazily conjugated or negated. Steals and returns a reference.
PyObject* resolved(PyObject* g);

struct Group {
  py::dict dict;
  py::list params;
  py::list held;  // the same parameters, kept alive so that an address means the same object
  const Kernel* kernel;
  py::object kernel_owner;
  std::vector<HyperKey> hyper;  // lr, weight_decay, then the kernel's
  std::vector<Switch> switches;
  py::object decoupled;               // True, False, or the key of a flag
  Cohort common = {};                 // read in each scan, without coefficients
  double values[2 + kMaxHyper] = {};  // in the order of hyper
  bool mine = false;                  // some row of it is stepped by this plan
  Sources sources = {};
  bool is_decoupled = false;
};

// A 0-dim state such as `step`.
struct Scalar {
  void* address;
  bool wide;  // double, else float
};

// What the plan knows of a row beyond what engines need. Small: a step goes through all of them.
struct Entry {
  PyObject* param;              // kept alive by its group
  const Layouts* layouts;       // with a gradient laid out like the parameter
  Anatomy::Kind gradient_kind;  // of a gradient that was found to fit
  Scalar scalars[kMaxScalars];
  std::uint32_t dims;  // in dims_: the parameter's shape, its strides, its gradient's when it was planned
  std::int32_t group;
  std::int32_t ndim;
  DLDataType gradient_type;
  std::uint8_t param_item, gradient_item;  // bytes of one element, as torch counts elements
  bool direct;                             // with a gradient laid out like the parameter
  bool mine;                               // this plan steps it; else another engine does
  bool ready;                              // has all its states
  bool first;                              // its states are new
  bool quick;                              // the anatomy can vouch for it
};

// A value in a parameter's state dict: it must stay the same object and, if it is a tensor of ours, in place.
struct Watch {
  PyObject* object;     // kept alive by values_
  const void* address;  // null: only the object matters
  int item_size;
};

struct StateWatch {
  PyObject* dict;              // null: no state; kept alive by state_values_
  std::uint32_t first, count;  // in watches_, in the dict's order
};

class Plan {
 public:
  // groups: list of (kernel capsule, [(key, index, low, high)], [(key, on)], decoupled), one per param group
  // mine: ids of the parameters that this plan steps; others of the same groups go to another engine
  // fresh: ids of the parameters whose states were created for this step
  Plan(py::list param_groups, py::list groups, py::dict state, const py::set& mine, const py::set& fresh);
  ~Plan() { release_gradients(); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // True when the tables stand and a step can run; false when the plan must be built anew.
  bool scan();

  // Runs an engine on the tables without the GIL. Returns (squared norm, skipped).
  py::tuple run(const py::capsule& engine, int threads, double inverse_scale, double max_norm, bool measure,
                bool update, bool skip_nonfinite, double squared_norm);

  // For engines on a device: writes for every row the gradient's address, plus one if its states are new (0: no
  // gradient, 2: one without elements), then for every group the pairs of a value and a source of its
  // hyperparameters, whether decay is decoupled, and the sign. Returns whether anything changed.
  bool write(const py::handle& live) const;

  // The step happened: advance the step counters.
  void commit();
  void release_gradients();

  std::size_t rows() const { return rows_.size(); }
  std::size_t cohorts() const { return cohorts_.size(); }
  int traverse(visitproc visit, void* arg) const;

 private:
  void add_group(py::dict dict, const py::tuple& spec);
  void add_row(std::size_t group, PyObject* param, bool mine, bool fresh);
  bool add_states(Entry& entry, Row& row, Layouts& layouts, const Geometry& geometry);
  void split_into_items();

  bool groups_stand();
  bool read_group(Group& group) const;
  bool states_stand() const;
  bool entry_stands_slowly(std::size_t i) const;
  bool param_stands(const Entry& entry, const Row& row) const;
  bool state_stands(std::size_t i) const;
  bool values_stand(const StateWatch& state) const;
  bool has_dims(const DLTensor& t, const Entry& entry) const;
  void prefetch_states(std::size_t i) const;
  void prefetch_gradient(std::size_t i) const;
  bool read_all();
  bool read_in_team();
  bool read_entry(std::size_t i);
  bool read_unusual(std::size_t i);
  bool fetch_gradient(std::size_t i);
  bool join_cohort(const Entry& entry, Row& row);
  bool find_source(PyObject* value, std::int64_t* source) const;
  bool strides_planned(const DLTensor& gradient, const Entry& entry) const;

  struct CohortKey {
    std::int32_t group;
    bool first;
    double before[kMaxScalars], after[kMaxScalars];
  };

  py::list param_groups_;
  py::dict state_;
  std::vector<Group> groups_;
  std::vector<Entry> entries_;
  std::vector<Row> rows_;
  std::vector<StateWatch> states_;  // per entry
  std::vector<Watch> watches_;
  std::vector<std::int64_t> dims_;
  std::vector<py::object> values_;        // what watches_ watch
  std::vector<py::object> state_values_;  // the values of the optimizer's state, in its order
  std::deque<Layout> layouts_;            // of parameters and states
  std::deque<Layouts> tables_;
  std::deque<Layout> step_layouts_;  // of this step's gradients
  std::deque<Layouts> step_tables_;

  std::vector<Cohort> cohorts_;
  std::vector<CohortKey> cohort_keys_;
  std::vector<PyObject*> gradients_;             // per entry, null without one; owned until the step is over
  std::vector<std::size_t> unusual_;             // entries to read by asking torch
  std::vector<Anatomy::Places> last_gradients_;  // per entry; hints only
  std::vector<Item> items_;
  std::vector<std::int64_t> bundles_;
  std::vector<double> partials_;
  std::int64_t numel_ = 0;
  DLDevice device_{kDLCPU, 0};
  bool counts_on_device_ = false;
};

}  // namespace fusedopt::host
