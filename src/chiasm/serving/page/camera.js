// The camera: phones have a program of their own for it behind a file field; elsewhere a window shows what it sees.

import { at, make } from "./dom.js";

const REFUSALS = {
  NotAllowedError: "The camera was refused. Allow it for this page in the browser's settings, or choose a picture.",
  NotFoundError: "No camera was found. Choose a picture instead.",
  NotReadableError: "Another program uses the camera. Close it there, or choose a picture.",
};

/** Have the camera's button bring pictures: `take(file)` gets each one, `hint(line)` is told why there is none. */
export function camera(take, hint) {
  const dialog = at("viewfinder");
  const video = dialog.querySelector("video");

  at("camera").addEventListener("click", async () => {
    if (matchMedia("(pointer: coarse)").matches) return at("snapshot").click();
    if (!navigator.mediaDevices)
      return hint("Browsers give the camera to pages over HTTPS or of this machine alone. Choose a picture instead.");
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
      dialog.showModal();
    } catch (error) {
      hint(REFUSALS[error.name] ?? `The camera cannot be used (${error.message}). Choose a picture instead.`);
    }
  });
  at("shut").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject.getTracks()) track.stop();
    at("camera").focus();
  });
  at("shoot").addEventListener("click", async () => {
    if (!video.videoWidth) return; // nothing was seen yet
    const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
    dialog.close();
    take(new File([blob], "camera.jpg", { type: blob.type }));
  });
}
