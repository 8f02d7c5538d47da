// Masks as the API sends them (COCO's compressed run lengths), decoded and painted.

/** Lengths of runs, background first: digits of base 32, lowest first; from the fourth on less the last but one. */
function runsOf(text) {
  const runs = [];
  for (let place = 0; place < text.length; ) {
    let [value, shift, digit] = [0, 0, 32];
    for (; digit & 32 && place < text.length; shift += 5) {
      digit = text.charCodeAt(place++) - 48;
      value |= (digit & 31) << shift;
    }
    if (digit & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs.at(-2) : value);
  }
  return runs;
}

/**
 * A layer over a picture of width x height pixels that knows which thing ({mask, index}) is where, -1 for none; later
 * things lie on top. It is smaller by a whole factor where the picture has more than `finest` pixels a side.
 */
export function layerOf(things, width, height, finest = 1600) {
  const step = Math.ceil(Math.max(width, height) / finest);
  const across = Math.ceil(width / step);
  const owner = new Int16Array(across * Math.ceil(height / step)).fill(-1);
  for (const { mask, index } of things) {
    let start = 0;
    runsOf(mask.counts).forEach((length, order) => {
      // Every second run is foreground. Runs go down the columns, and on from the foot of one to the head of the next.
      for (let from = start; order % 2 && from < start + length; ) {
        const column = Math.floor(from / height);
        const end = Math.min(start + length, (column + 1) * height);
        const last = column % step ? 0 : end - column * height; // columns between those of the layer are passed over
        for (let row = Math.ceil((from - column * height) / step); row * step < last; row++)
          owner[row * across + column / step] = index;
        from = end;
      }
      start += length;
    });
  }
  return { owner, across, at: (x, y) => owner[Math.floor(y / step) * across + Math.floor(x / step)] };
}

/** Paint a layer in `colours` ('#rrggbb'), edges opaque, `inner` (0..255) within: all things, or the one `lit`. */
export function paint(canvas, { owner, across }, colours, inner, lit) {
  const down = owner.length / across;
  Object.assign(canvas, { width: across, height: down });
  const image = new ImageData(across, down);
  const inks = colours.map((colour) => [1, 3, 5].map((place) => Number.parseInt(colour.slice(place, place + 2), 16)));
  for (let place = 0; place < owner.length; place++) {
    const index = owner[place];
    if (index < 0 || (lit !== null && lit !== index)) continue;
    const column = place % across;
    const within =
      (column === 0 || owner[place - 1] === index) &&
      (column === across - 1 || owner[place + 1] === index) &&
      (place < across || owner[place - across] === index) &&
      (place + across >= owner.length || owner[place + across] === index);
    image.data.set([...inks[index], within ? inner : 255], 4 * place);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
