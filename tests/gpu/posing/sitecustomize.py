"""What Python loads first in every process of a run that poses; see pose.py beside it."""

import importlib.util
import os
import sys
from pathlib import Path

if os.environ.get("WAN_VAE_PARALLEL_TESTS_POSE"):
    _spec = importlib.util.spec_from_file_location("wan_vae_parallel_pose", Path(__file__).with_name("pose.py"))
    _pose = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_pose)
    sys.modules[_spec.name] = _pose
    _pose.install(os.environ[_pose.VARIABLE])
