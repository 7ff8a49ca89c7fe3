"""Makes Triton's interpreter fit for tests: it looks through the whole language again at every function call."""


def patch_language_once():
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
