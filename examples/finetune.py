"""Continue training a saved or published model on your own images:
`python examples/finetune.py MODEL IMAGE_FOLDER OUTPUT_FOLDER [TRAINING FLAGS]`.

Give --denoiser, such as `--denoiser tiny` for the moons, if the model has another network than the default of train.py,
which refuses weights that do not fit. train.py runs in a process of its own, as from the command line.
"""

import subprocess
import sys
from pathlib import Path

from ddpm_pipeline import DDPMPipeline

if len(sys.argv) < 4:
    sys.exit(__doc__)
model, images, output, *flags = sys.argv[1:]

pipe = DDPMPipeline.from_pretrained(model)
size = pipe.unet.config.sample_size
height, width = (size, size) if isinstance(size, int) else size
train = Path(__file__).parents[1] / "training" / "train.py"
command = [sys.executable, str(train), "--train_data_dir", images, "--output_dir", output, "--init_from", model]
command += ["--resolution", f"{height}x{width}", "--prediction_type", pipe.scheduler.config.prediction_type]
command += ["--ddpm_num_steps", str(pipe.scheduler.config.num_train_timesteps), "--learning_rate", "1e-4"]
sys.exit(subprocess.run([*command, *flags]).returncode)
