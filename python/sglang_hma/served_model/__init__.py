"""The package that SGLANG_EXTERNAL_MODEL_PACKAGE names: SGLang takes its models from here and
imports its own two hundred modules of them only if the served one is not among these."""
