"""The segmentation discriminator (Sec. 3.1, Fig. 2 B): ResNet-101 + UperNet with N+1 outputs, and
its losses.

It learns to segment real images into their layout and to label every pixel of a generated image as
class N, "fake". Attribute names are those of mit-semseg (`encoder.`, `decoder.`), whose ADE20K
segmenter initialises the official discriminator.
"""
import torch
import torch.nn.functional as F
from torch import nn

IGNORE = 255  # void pixels of a label map carry no loss
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv(cin, cout, kernel, stride=1):
    """A convolution without bias, since a batch norm follows."""
    return nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False)


def conv_bn(cin, cout, kernel):
    return nn.Sequential(
        conv(cin, cout, kernel),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
    )


def resize(x, like):
    """x [B,c,h,w] -> [B,c,h',w'], the size of `like` [B,c',h',w']."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions with width, width, 4 width channels."""

    def __init__(self, cin, width, stride):
        super().__init__()
        cout = 4 * width
        self.conv1 = conv(cin, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, cout, 1)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = nn.Identity()
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(
                conv(cin, cout, 1, stride),
                nn.BatchNorm2d(cout),
            )

    def forward(self, x):
        """x [B,cin,h,w] -> [B,4 width,h/stride,w/stride]."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + self.downsample(x))


def stage(blocks, cin, width, stride):
    """A sequence of Bottlenecks, cin -> 4 width channels; only the first one is strided."""
    rest = [Bottleneck(4 * width, width, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(cin, width, stride), *rest)


class ResNet(nn.Module):
    """Image -> four feature maps of 4, 8, 16 and 32 `width` channels.

    Their resolutions are 1/4, 1/8, 1/16 and 1/32 of the image's. A `stem_stride` of 2 or 1 doubles
    or quadruples them, so that small objects survive in small images.
    """

    def __init__(self, layers, width, stem_stride):
        super().__init__()
        stride = 2 if stem_stride > 1 else 1
        self.conv1 = conv(3, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 2 * width, 3)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem_stride == 4 else nn.Identity()
        self.layer1 = stage(layers[0], 2 * width, width, stride=1)
        self.layer2 = stage(layers[1], 4 * width, 2 * width, stride=2)
        self.layer3 = stage(layers[2], 8 * width, 4 * width, stride=2)
        self.layer4 = stage(layers[3], 16 * width, 8 * width, stride=2)

    def forward(self, image):
        """image [B,3,H,W] -> list of four maps, finest first."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.pool(x)  # (B, 2 width, H/4, W/4)
        c2 = self.layer1(x)  # (B, 4 width, H/4, W/4)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)  # (B, 32 width, H/32, W/32)
        return [c2, c3, c4, c5]


class UperNetHead(nn.Module):
    """Pools the coarsest map at four scales, runs a feature pyramid from there to the finest map,
    and fuses all levels at the finest resolution (Xiao et al. 2018).

    channels   of the four maps
    dim        channels of the pyramid
    ppm_dim    channels of each pooled map (PPM: pyramid pooling module)
    """
    scales = (1, 2, 3, 6)  # cells along each side of the pooled maps

    def __init__(self, num_classes, channels, dim, ppm_dim):
        super().__init__()
        *finer, top = channels
        self.ppm_conv = nn.ModuleList(conv_bn(top, ppm_dim, 1) for _ in self.scales)
        self.ppm_last_conv = conv_bn(top + len(self.scales) * ppm_dim, dim, 3)
        self.fpn_in = nn.ModuleList(conv_bn(c, dim, 1) for c in finer)
        self.fpn_out = nn.ModuleList(nn.Sequential(conv_bn(dim, dim, 3)) for _ in finer)
        self.conv_last = nn.Sequential(
            conv_bn(4 * dim, dim, 3),
            nn.Conv2d(dim, num_classes, 1),
        )

    def forward(self, maps):
        """The encoder's four maps -> logits [B,num_classes,H/4,W/4]."""
        top = maps[-1]
        pooled = [top]
        for scale, layer in zip(self.scales, self.ppm_conv):
            h = F.adaptive_avg_pool2d(top, scale)  # (B, 32 width, scale, scale)
            h = resize(h, top)
            pooled.append(layer(h))
        f = self.ppm_last_conv(torch.cat(pooled, dim=1))  # (B, dim, H/32, W/32)
        pyramid = [f]
        for i in (2, 1, 0):  # coarse to fine
            lateral = self.fpn_in[i](maps[i])
            f = lateral + resize(f, lateral)
            pyramid.append(self.fpn_out[i](f))
        levels = [resize(level, like=f) for level in reversed(pyramid)]
        fused = torch.cat(levels, dim=1)  # (B, 4 dim, H/4, W/4)
        return self.conv_last(fused)


class UperNet(nn.Module):
    """image [B,3,H,W] in [-1,1] -> logits [B,num_classes,H,W].

    The defaults are mit-semseg's ResNet-101 + UperNet. `normalize` selects the network's input:
    True subtracts ImageNet's mean and divides by its standard deviation, as every network expects
    that starts from mit-semseg's weights; False passes [-1,1] unchanged.
    """

    def __init__(self, num_classes, layers=(3, 4, 23, 3), width=64, fpn_dim=512, ppm_dim=512,
                 stem_stride=4):
        super().__init__()
        self.encoder = ResNet(layers, width, stem_stride)
        channels = [4 * width, 8 * width, 16 * width, 32 * width]
        self.decoder = UperNetHead(num_classes, channels, fpn_dim, ppm_dim)
        self.normalize = False
        imagenet = torch.tensor(IMAGENET_MEAN_STD).view(2, 3, 1, 1)
        self.register_buffer("imagenet", imagenet, persistent=False)  # not in the files

    def features(self, image):
        """image [B,3,H,W] in [-1,1] -> the encoder's four maps."""
        if self.normalize:
            mean, std = self.imagenet
            image = ((image + 1) / 2 - mean) / std
        return self.encoder(image)

    def forward(self, image):
        logits = self.decoder(self.features(image))
        return resize(logits, image)


# -- losses (Sec. 3.1) -----------------------------------------------------------------------------


def class_balance(label, num_classes):
    """gamma_c, the inverse frequency of each pixel's class.

    label [B,H,W] int64 -> weight [B,H,W] = n_valid / (count_c * n_present * num_classes), counted
    over the batch, and 0 where the label is void. Thus sum(gamma * loss) / n_valid is
    1/num_classes times the mean, over the classes present, of each class's mean loss.
    """
    valid = label != IGNORE
    # scatter_add_ instead of bincount, for which the CPU would wait for the GPU
    label = label.where(valid, num_classes)  # void gets a bin of its own, past the classes
    count = torch.zeros(num_classes + 1, dtype=torch.int64, device=label.device)
    count.scatter_add_(0, label.flatten(), torch.ones_like(label).flatten())
    count = count[:num_classes]
    n_present = (count > 0).sum().clamp(min=1)
    gamma = valid.sum() / (count.clamp(min=1) * n_present * num_classes)  # (num_classes,)
    return F.pad(gamma, (0, 1))[label]


def layout_loss_map(logits, label, gamma=None):
    """The adversarial loss of each pixel, gamma_c * CE(Dis(x0_hat), y) (Sec. 3.1).

    logits [B,N+1,H,W], label [B,H,W], gamma [B,H,W] from `class_balance` (None: computed here)
    -> [B,H,W] fp32, 0 at void pixels. L_adv is its sum over the number of valid pixels.
    """
    if gamma is None:
        gamma = class_balance(label, logits.shape[1])
    ce = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    return gamma * ce


def per_valid_pixel(loss_map, label):
    """loss_map [B,H,W] -> its sum divided by the number of pixels that are not void (scalar)."""
    return loss_map.sum() / (label != IGNORE).sum().clamp(min=1)


def discriminator_loss(real_logits, fake_logits, label, fake_weight):
    """L_Dis (Sec. 3.1): segment real images into their layout, call every pixel of a fake class N.

    real_logits, fake_logits [B,N+1,H,W], label [B,H,W] -> scalar, and its parts: real, fake, and
    `caught`, the fraction of the fakes' pixels classified as fake.
    """
    real = per_valid_pixel(layout_loss_map(real_logits, label), label)
    log_p_fake = F.log_softmax(fake_logits.float(), dim=1)[:, -1]  # (B, H, W)
    fake = -log_p_fake.mean()
    caught = fake_logits.argmax(1) == fake_logits.shape[1] - 1  # (B, H, W)
    parts = {"real": real, "fake": fake, "caught": caught.float().mean()}
    return real + fake_weight * fake, parts


# -- mIoU ------------------------------------------------------------------------------------------


def confusion_matrix(pred, label, num_classes):
    """pred, label [...] int64 -> counts [num_classes,num_classes], a row per true class."""
    valid = label != IGNORE
    pairs = label[valid] * num_classes + pred[valid]
    count = torch.bincount(pairs, minlength=num_classes ** 2)
    return count.view(num_classes, num_classes)


def mean_iou(confusion):
    """confusion [N,N] -> mean IoU, IoU per class [N]; nan for a class that occurs in neither."""
    hit = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    iou = hit / union
    return iou.nanmean().item(), iou
