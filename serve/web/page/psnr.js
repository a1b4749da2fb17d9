// How far two shown images are apart.

const PEAK = 255;

function pixelsOf(image) {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

/** Peak signal-to-noise ratio in dB over red, green and blue; Infinity for equal images. */
export async function psnrOf(one, other) {
  await Promise.all([one.decode(), other.decode()]);
  const [a, b] = [pixelsOf(one), pixelsOf(other)];
  let sum = 0;
  for (let i = 0; i < a.length; i += 1) {
    if (i % 4 !== 3) sum += (a[i] - b[i]) ** 2;
  }
  return 10 * Math.log10(PEAK ** 2 / (sum / (a.length * 0.75)));
}
