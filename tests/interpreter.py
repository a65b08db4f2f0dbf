"""What Triton's interpreter needs to run with the numpy at hand."""

import importlib.metadata


def mend() -> None:
    """Until 3.8 the interpreter counts `range(0, K)` by int() of an array of one element, which numpy refuses since
    2.4: the same number is read with item(). And its maximum and minimum hand NaN on, which a GPU's do not."""
    if [int(part) for part in importlib.metadata.version("triton").split(".")[:2]] >= [3, 8]:
        return
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
