"""The painter of Portrait World: attributes of people, scenes, and how each part of an image is drawn."""
