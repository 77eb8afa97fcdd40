import pytest
from benchmarks.cifar10 import scores

from tests.support import SHARED

FOLDER = SHARED / "cifar10"


@pytest.mark.skipif(not FOLDER.exists(), reason="the shared CIFAR-10 images are not here")
def test_class_wise_beats_the_plain_gradient_and_random_channels_on_unseen_images():
    found = {name.split("(")[0]: shares for name, shares in scores(FOLDER, mosaics=40).items()}
    class_wise = found["ClassWise"].mean()
    # A prototype scored 0.42 against 0.31; the standard error is below 0.01.
    assert class_wise > found["plain gradient"].mean() + 0.06
    assert class_wise > found["RandomChannels"].mean() + 0.06
