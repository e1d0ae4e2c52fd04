"""A few of each fault of `make faults`, which does many: real processes, kills and disks."""

import pytest

from tests.faults import crowd, damaged, disk, kills, ranks

pytestmark = pytest.mark.processes


def test_a_crowd_of_processes_keeps_whole_tables():
    assert crowd.run(8, 1)["failures"] == {}


def test_kills_leave_whole_tables():
    assert kills.run(12)["failures"] == {}


def test_damaged_files_are_misses():
    assert damaged.run(180)["failures"] == {}


def test_disks_that_fail_and_folders_as_clusters_mount_them():
    assert disk.run()["failures"] == {}


@pytest.mark.parametrize("scene", list(ranks.SCENES))
def test_ranks(scene):
    assert ranks.run(3, 2.0, [scene])["failures"] == {}
