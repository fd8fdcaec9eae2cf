"""What every job stands on: options, Ray, outputs, models, MLflow."""
