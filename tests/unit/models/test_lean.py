import subprocess
import sys

PROGRAM = """
import sys
import honed.learner.main
print(*sorted({"sklearn", "scipy"} & set(sys.modules)), "loaded")
import importlib.metadata
print("torch" in importlib.metadata.packages_distributions())
from honed.models.new_tokenizer import train_tokenizer
import scipy, sklearn
print(scipy.__name__, sklearn.__name__)
"""


def test_a_learner_starts_without_what_it_does_not_need_and_others_can_still_import_it():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=True)
    assert ended.stdout.split() == ["loaded", "True", "scipy", "sklearn"]
