"""A stand-in for torchvision, which the project does not need but the training scripts of peers import."""

utils = None  # would save samples during training, which no benchmark asks for
