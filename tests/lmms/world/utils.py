"""The functions of the task built_in_world, for lmms-eval."""

import io

from PIL import Image

from vaopd.evaluate.grade import is_correct


def pictures(doc):
    return [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in doc["images"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["problem"].removeprefix("<image>")


def grade(doc, results):
    return {"correct": float(is_correct(results[0], doc["answer"]))}
