"""The trainer: objective, loop, run folders, evaluation by the real decoder, reports and model cards (METHOD 4)."""
