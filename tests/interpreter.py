"""What Triton's interpreter needs to run with the numpy at hand, and in a third less time."""

import importlib.metadata


def mend() -> None:
    """Until 3.8 the interpreter counts `range(0, K)` by int() of an array of one element, which numpy refuses since
    2.4: the same number is read with item(). And its maximum and minimum hand NaN on, which a GPU's do not. In all
    versions it looks through triton.language, to put its own functions there, at each call of one device function by
    another: while a kernel runs, they are there."""
    from triton.runtime import interpreter

    patch_lang, done = interpreter._patch_lang, set()

    def patched_lang(fn):
        languages = [id(interpreter.tl), id(interpreter.tl.core)]
        modules = {id(value) for value in fn.__globals__.values() if id(value) in languages}
        if modules <= done:
            return interpreter._LangPatchScope()
        done.update(modules)
        return patch_lang(fn)

    launch = interpreter.GridExecutor.__call__

    def launched(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patched_lang, launched
    if [int(part) for part in importlib.metadata.version("triton").split(".")[:2]] >= [3, 8]:
        return
    import numpy as np

    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
