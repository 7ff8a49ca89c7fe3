// The roster: every tensor that one engine steps, in the order of the param groups, and what is known of each.
//
// `scan` finds out before every step whether all of it is still so. It reads in this order, so that nothing is touched
// that was not found valid: what may run Python, then what cannot. The first is numbers and groups, and gradients and
// states where they are not torch's and Python's own; the second is the others, and every tensor's geometry, of which
// the first needs the GIL and the last may be shared among threads meanwhile. It writes nothing.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "host/abi.h"
#include "host/groups.h"
#include "host/tensors.h"

namespace fusedopt::host {

// A tensor as it was when it was planned.
struct Member {
  PyObject* tensor = nullptr;  // null: there is none; kept alive by the roster
  void* address = nullptr;
  DType dtype = DType::f32;  // of a complex tensor's parts
  bool is_complex = false;
  bool has_memory = false;
  std::uint32_t dims = 0;  // where its shape and strides stand
};

// A parameter of the groups, with its states. One that another engine steps is only a place in the order.
struct Entry {
  PyObject* whole = nullptr;  // the parameter of the group; `param` is the part of it that is here
  bool is_member = false;
  bool is_steppable = false;  // has all that its kernel needs, with memory, on one device
  std::int32_t group = 0;
  std::int32_t ndim = 0;
  std::int64_t numel = 0;  // of complex tensors, numbers and not pairs of them
  Member param;
  std::uint32_t first = 0;  // of its states, among the roster's members; see Roster::Place
  // Of its gradient: as it was when it was planned, else like the parameter.
  DType gradient_dtype = DType::f32;
  std::uint32_t gradient_strides = 0;
  const void* gradient_address = nullptr;  // when it was planned, null without one
};

inline bool is_aligned(const void* address, DType dtype) {
  return reinterpret_cast<std::uintptr_t>(address) % kDTypeSizes[static_cast<int>(dtype)] == 0;
}

class Roster {
 public:
  // groups: a spec for each param group, see Group
  // members: which parameters, counted through all groups, are stepped by this plan; others go to another
  // new_state, new_average: which of them have states of the rule, or averages, that were made for the step to come
  Roster(py::object param_groups, const py::list& groups, py::object state, const std::vector<std::size_t>& members,
         const std::vector<std::size_t>& new_state, const std::vector<std::size_t>& new_average);
  ~Roster() { release(); }
  Roster(const Roster&) = delete;
  Roster& operator=(const Roster&) = delete;

  // True when all is as it was planned and a step can run; false when a plan must be made anew, which then says why.
  bool scan(int threads, SourceOf source_of, const void* context);
  // Raises if any tensor or gradient is not as the last scan found it.
  void check(int threads);
  // Lets go of the step's gradients.
  void release();
  // Takes the step's gradients from their parameters.
  void free_gradients();
  // Tells autograd that the parameters with gradients were written.
  void increment_versions() const;
  // The same groups stand in another list now.
  void rebind(py::object param_groups) { param_groups_ = std::move(param_groups); }

  std::size_t size() const { return entries_.size(); }
  const Entry& entry(std::size_t i) const { return entries_[i]; }
  const Kernel& kernel(const Entry& entry) const { return groups_[static_cast<std::size_t>(entry.group)].kernel(); }
  std::span<const Member> states(const Entry& entry) const {
    return std::span(members_).subspan(entry.first, kernel(entry).names.states.size());
  }
  std::span<const Member> scalars(const Entry& entry) const {
    const RuleNames& names = kernel(entry).names;
    return std::span(members_).subspan(entry.first + names.states.size(), names.scalars.size());
  }
  // What the engine has of it besides the rule: null if there is none.
  const Member* average(const Entry& entry) const {
    return group_of(entry).average() == Average::kNone ? nullptr : &members_[own_of(entry) + kAverage];
  }
  const Member* counter(const Entry& entry) const {
    return group_of(entry).counts() ? &members_[own_of(entry) + kCounter] : nullptr;
  }
  const Member* master(const Entry& entry) const {
    return group_of(entry).master_state().empty() ? nullptr : &members_[own_of(entry) + kMaster];
  }
  // Of the codes of a state.
  const Member* scales(const Entry& entry, std::size_t state) const {
    return states(entry)[state].dtype == DType::u8 ? &members_[own_of(entry) + kScales + state] : nullptr;
  }
  const Group& group(std::size_t g) const { return groups_[g]; }
  std::size_t groups() const { return groups_.size(); }
  const std::int64_t* dims(std::uint32_t at) const { return dims_.data() + at; }
  const Geometry& device() const { return device_; }  // that all members are on

  // Of the step that was scanned. A gradient that is not laid out as planned tells its strides.
  bool has_gradient(std::size_t i) const { return gradients_[i] != nullptr; }
  const void* gradient_address(std::size_t i) const { return addresses_[i]; }
  const std::int64_t* gradient_strides(std::size_t i) const {
    return step_strides_[i] ? step_dims_.data() + (step_strides_[i] - 1) : nullptr;
  }

  std::size_t group_of(std::size_t i) const { return static_cast<std::size_t>(briefs_[i].group); }
  bool has_new_state(std::size_t i) const { return briefs_[i].new_state; }
  bool has_new_average(std::size_t i) const { return briefs_[i].new_average; }
  void set_stepped(std::size_t i) { briefs_[i].new_state = briefs_[i].new_average = false; }

  // (tensor, address, dtype, shape, strides, storage bytes) of all that a scan vouched for; -1 bytes for gradients.
  py::list facts() const;
  int traverse(visitproc visit, void* arg) const;

 private:
  // Where an entry's members are, behind its states and scalars. Those that it has not are empty.
  enum Place { kAverage, kCounter, kMaster, kScales };

  const Group& group_of(const Entry& entry) const { return groups_[static_cast<std::size_t>(entry.group)]; }
  std::size_t own_of(const Entry& entry) const {
    const RuleNames& names = kernel(entry).names;
    return entry.first + names.states.size() + names.scalars.size();
  }
  Entry entry_of(std::size_t group, PyObject* param);
  void add_states(Entry& entry, std::size_t i);
  bool has_all(const Entry& entry) const;
  GradientExpectation gradient_of(Entry& entry, const Expectation& param);
  bool expect(PyObject* tensor, Member* out);
  bool expect_local(PyObject* tensor, Member* out);
  bool storages_are_disjoint();
  void find_written();
  bool is_lazily_written(PyObject* gradient, bool is_complex) const;

  bool is_still_valid(int threads);
  bool read_all(int threads, SourceOf source_of, const void* context);
  bool read_groups(SourceOf source_of, const void* context);
  bool can_be_silent() const;
  bool find_parts();
  bool parts_are_unchanged() const;
  bool fetch_gradients();
  PyObject* local_gradient(std::size_t i, PyObject* gradient);
  bool fetch_gradients_silently();
  void prefetch_gradient(std::size_t i) const;
  bool groups_are_unchanged() const;
  bool states_are_unchanged() const;
  bool items_are_unchanged(std::size_t i) const;
  bool tensors_are_unchanged(int threads, const std::function<bool()>& meanwhile);
  bool find_address(std::size_t i);
  void forget_addresses();

  struct Item {
    PyObject *key, *value;
  };
  struct StateItems {
    PyObject* mapping = nullptr;         // null: no state
    std::uint32_t first = 0, count = 0;  // in items_
  };

  py::object param_groups_, state_;
  std::vector<Group> groups_;
  std::vector<bool> has_members_;  // of each group
  std::vector<Entry> entries_;
  std::vector<Member> members_;          // of each entry that is a member
  std::vector<StateItems> state_items_;  // of each entry
  std::vector<Item> items_;
  std::vector<Item> all_states_;  // the optimizer's, in their order
  std::vector<py::object> held_;  // keys and values of items_ and all_states_
  std::vector<std::int64_t> dims_;
  std::vector<Expectation> expectations_;
  std::vector<PyObject*> expected_;  // whose they are
  // A tensor that is spread over ranks: the part that is here, and how it is spread, when it was planned.
  struct DTensor {
    PyObject* whole;
    py::object placement;
    std::size_t expected;  // the part's place in expected_
    py::object local;      // the part, held from a scan to the end of its step only: it may be moved out of memory
  };
  std::vector<DTensor> dtensors_;
  struct Span {
    std::uintptr_t begin, end;
  };
  std::vector<Span> storages_;  // of the members' tensors
  bool may_share_work_ = true;  // among threads: no two of its tensors have one storage
  WrittenMemory written_;       // by the optimizer's step, whichever plan's
  Geometry device_;

  // What a scan reads of each entry, close together.
  struct Brief {
    PyObject* param;
    std::int32_t group;
    DType gradient_dtype;
    bool is_member, is_steppable, is_complex, new_state, new_average, is_dtensor;
    const PyTypeObject* type;
    const PyObject* gradient;  // the last one, to prefetch it
    Parts parts;
  };
  std::vector<Brief> briefs_;
  std::vector<GradientExpectation> like_;
  std::vector<py::object> gradient_placements_;  // of each entry that is spread: of the last gradient that was found to
                                                 // be spread like it

  // Of each entry, in the step that was scanned.
  std::vector<Abi::Handle> gradients_;  // of gradients that are owned; null without one
  std::vector<const void*> addresses_;
  std::vector<std::size_t> step_strides_;  // where they stand in step_dims_, plus one; 0: as planned
  std::vector<std::int64_t> step_dims_;
  // Reading gradients and states runs no Python, as far as is known: they are torch's and Python's own classes.
  bool silent_ = true;
  // Scans in a row that had to ask whether a gradient is spread as its parameter is, which runs Python.
  int asking_scans_ = 0;
  bool asks_ = false;
};

}  // namespace fusedopt::host
