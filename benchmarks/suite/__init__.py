"""What run.py runs. The dependencies go one way: devices and contenders -> measure -> cases."""
