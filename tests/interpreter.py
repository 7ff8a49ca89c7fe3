"""Makes Triton's interpreter fit for tests: what it would find out again at every call it finds out once."""

import functools


def patch():
    """Replaces what takes much of its time."""
    _patch_language_once()
    _remember_types()


def _patch_language_once():
    """Within a launch, what one function has had replaced need not be replaced again for the next."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    done = set()

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            done.clear()
            self.scope.restore()

    def once(fn):
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not modules <= done:
            done.update(modules)
            return Scope(original(fn))

    interpreter._patch_lang = once


def _remember_types():
    """NumPy's type for one of Triton's, and what a tensor's type says of its shape."""
    import triton.language as tl
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    by_name = functools.cache(lambda name: look_up(tl.dtype(name)))
    interpreter._get_np_dtype = lambda type: look_up(type) if type.scalar.is_ptr() else by_name(type.scalar.name)

    initialise = tl.tensor.__init__
    scalar = tl.tensor(None, tl.int32)  # its shape is that of all scalars

    def init(self, handle, type):
        if type.is_block():
            initialise(self, handle, type)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = scalar.shape, scalar.numel

    tl.tensor.__init__ = init
