"""Continue training a saved or published model on your own images:
`python examples/finetune.py MODEL IMAGE_FOLDER OUTPUT_FOLDER [TRAINING FLAGS]`.

The new run has the network, size, prediction type and number of diffusion timesteps of the model. train.py runs in a
process of its own, as from the command line.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project, so that `training` is found

from ddpm_pipeline import DDPMPipeline  # noqa: E402

if len(sys.argv) < 4:
    sys.exit(__doc__)
model, images, output, *flags = sys.argv[1:]

pipe = DDPMPipeline.from_pretrained(model)
size = pipe.unet.config.sample_size
height, width = (size, size) if isinstance(size, int) else size
command = [sys.executable, str(ROOT / "training" / "train.py"), "--init_from", model]
command += ["--train_data_dir", images, "--output_dir", output]
command += ["--resolution", f"{height}x{width}", "--prediction_type", pipe.scheduler.config.prediction_type]
command += ["--ddpm_num_steps", str(pipe.scheduler.config.num_train_timesteps), "--learning_rate", "1e-4"]
sys.exit(subprocess.run([*command, *flags]).returncode)
