"""What TensorBoard's own reader, the one behind its pages, finds in a run's folder, as JSON.

    python reader.py FOLDER
"""

import json
import sys

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

events = EventAccumulator(sys.argv[1], size_guidance={"tensors": 0}, tensor_size_guidance={"scalars": 0, "text": 0})
events.Reload()
found = {"scalars": {}, "text": {}}
for tag in events.Tags()["tensors"]:
    plugin = events.SummaryMetadata(tag).plugin_data.plugin_name
    found[plugin][tag] = [[event.step, make_ndarray(event.tensor_proto).item()] for event in events.Tensors(tag)]
texts = [[step, text.decode()] for step, text in found["text"]["sample"]]
print(json.dumps({"scalars": found["scalars"], "texts": texts}))
