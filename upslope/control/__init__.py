"""Wing 2: deep agents on Gymnasium environments."""
