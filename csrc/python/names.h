// Names as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

#include "core/rule.h"

namespace fusedopt {

inline pybind11::list names(std::span<const std::string_view> list) {
  pybind11::list out;
  for (const std::string_view name : list) out.append(pybind11::str(name.data(), name.size()));
  return out;
}

inline pybind11::dict describe(const RuleNames& rule) {
  pybind11::dict d;
  d["rule"] = pybind11::str(rule.rule.data(), rule.rule.size());
  d["states"] = names(rule.states);
  d["scalars"] = names(rule.scalars);
  d["hyper"] = names(rule.hyper);
  d["coefficients"] = names(rule.coefficients);
  d["measures"] = names(rule.measures);
  d["epilogue"] = names(rule.epilogue);
  d["score"] = rule.has_score;
  d["replaces"] = rule.replaces;
  d["step_scale"] = pybind11::str(rule.step_scale.data(), rule.step_scale.size());
  return d;
}

}  // namespace fusedopt
